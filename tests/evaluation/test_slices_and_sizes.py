"""Named sets of rows side by side, decompositions of several sizes, and the runs that train them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.evaluation import handmade
from tests.evaluation.handmade import KNOWN, VOCABULARY, one_token_rows
from tests.tiny import GAMMA, decomposition_of, some_tokens, tiny_model
from tl_vpd import SavingConfig, VPDConfig
from tl_vpd.evaluation import (
    aggregation,
    alive_of,
    compute_recovered,
    evaluate,
    sampled,
    scrambled,
    sizes,
    slices,
    train_sizes,
)
from tl_vpd.evaluation.intervals import interval
from tl_vpd.masking.modes import masks_of_mode


def test_a_slice_is_what_the_sample_alone_would_be():
    model = tiny_model(torch.float32)
    vpd = decomposition_of(model)
    rows = {"one": some_tokens(seed=0, shape=(4, 7)), "other": some_tokens(seed=1, shape=(3, 5))}
    table = slices(vpd, model, rows, steps=2, attack_rows=2)
    assert list(table.index) == ["one", "other"] and list(table["tokens"]) == [28, 15]
    for name, tokens in rows.items():
        with sampled(vpd, model, tokens) as sample:
            rounded = sample.distances(lambda i: masks_of_mode("rounded", sample.g[i], sample.site_axis))
            union = aggregation(sample, sizes=(2,))
        assert table.loc[name, "rounded"] == pytest.approx(rounded.mean, rel=1e-6)
        assert table.loc[name, "kl_union"] == pytest.approx(union.loc[2, "kl_union"], rel=1e-6)
    assert (table["share_of_zero"] == table["rounded"] / table["zero"]).all()
    assert (table["pgd_kl"] > 0).all()


def test_a_lookup_table_does_not_hold_on_unknown_tokens():
    model = handmade.known_model()
    rows = {"known": one_token_rows(0, KNOWN), "unknown": one_token_rows(KNOWN, VOCABULARY)}
    right, table = (slices(vpd, model, rows, steps=0) for vpd in (handmade.right(model), handmade.lookup_table(model)))
    assert (right["rounded"] < 1e-5).all() and table.loc["known", "rounded"] < 1e-5
    assert table.loc["unknown", "share_of_zero"] > 0.3
    assert "pgd_kl" not in table


def test_scrambled_rows_hold_the_same_tokens_and_keep_the_first():
    model = tiny_model(torch.float32)
    tokens = some_tokens(shape=(6, 9))
    found = scrambled(model, tokens, seed=1)
    assert torch.equal(found[:, 0], tokens[:, 0])
    assert torch.equal(found.sort(1).values, tokens.sort(1).values)
    assert not torch.equal(found, tokens)
    assert torch.equal(found, scrambled(model, tokens, seed=1))


def test_a_slice_that_does_not_fit_is_named():
    model = tiny_model(torch.float32)
    with pytest.raises(ValueError, match="Slice 'long': Sequences of 11 tokens"):
        slices(decomposition_of(model), model, {"long": torch.zeros(1, 11, dtype=torch.long)})
    with pytest.raises(ValueError, match="no slices"):
        slices(decomposition_of(model), model, {})


def test_sizes_count_the_living():
    model = handmade.known_model()
    right, table = handmade.right(model), handmade.lookup_table(model)
    tokens = one_token_rows(0, KNOWN)
    found = sizes({"right": right, "again": right, "table": table}, model, tokens)
    alive = sum(int(own.sum()) for own in alive_of(right, model, tokens).values())
    assert list(found["alive"]) == [alive, alive, 2 * KNOWN]
    assert found.loc["again", "alive_growth"] == 1.0
    assert found.loc["right", "rounded_kl"] < 1e-5


def test_train_sizes_scales_C_goes_on_and_refuses_other_settings(tmp_path: Path):
    model, tokens = tiny_model(torch.float32), some_tokens(shape=(4, 6))
    config = VPDConfig(steps=1, batch_size=2, C=4, gamma=GAMMA, faithfulness={"warm_up_steps": 0}, sites=("blocks.0.mlp.*",))
    found = train_sizes(model, tokens, config, factors=(0.1, 0.5, 2), saving=SavingConfig(folder=tmp_path), progress=False)
    assert [set(own.counts.values()) for own in found.values()] == [{1}, {2}, {8}]
    again = train_sizes(model, tokens, config, factors=(0.5,), saving=SavingConfig(folder=tmp_path), progress=False)
    for name in again[0.5].sites:
        assert torch.equal(again[0.5].V[name], found[0.5].V[name])
    other = config.model_copy(update={"steps": 2})
    with pytest.raises(ValueError, match="other settings"):
        train_sizes(model, tokens, other, factors=(0.5,), saving=SavingConfig(folder=tmp_path), progress=False)
    table = sizes(found, model, tokens)
    assert list(table["built"]) == [2, 4, 16]


def test_rows_of_one_token_have_no_cross_entropy_and_the_rest_is_measured():
    model = tiny_model(torch.float32)
    vpd, tokens = decomposition_of(model), some_tokens(shape=(4, 1))
    row = slices(vpd, model, {"short": tokens}, steps=0).loc["short"]
    assert row["tokens"] == 4 and np.isnan(row["target_ce"]) and row["rounded"] >= 0
    report = evaluate(vpd, model, tokens, budgets=(2,), measures=(), controls=False)
    assert np.isnan(report.record["target_ce"]) and report.record["tokens"] == 4
    assert interval(np.array([1.0, 2.0]), np.zeros(2)) == pytest.approx((np.nan, np.nan), nan_ok=True)
    assert np.isnan(compute_recovered(float("nan"), [(0, 3.0), (10, 1.0)]))


def test_no_row_to_attack_is_refused():
    model = tiny_model(torch.float32)
    with pytest.raises(ValueError, match="attack_rows=0: at least one row is attacked"):
        evaluate(decomposition_of(model), model, some_tokens(), budgets=(2,), attack_rows=0, measures=())


def test_sizes_go_on_where_a_first_state_was_cut_off(tmp_path: Path):
    model = tiny_model(torch.float32)
    config = VPDConfig(steps=2, batch_size=2, C=2, gamma=GAMMA, faithfulness={"warm_up_steps": 0})
    (tmp_path / "C-1" / "state").mkdir(parents=True)
    (tmp_path / "C-1" / "state" / ".step-00000000.safetensors.1.tmp").write_bytes(b"cut")
    found = train_sizes(model, some_tokens(shape=(4, 6)), config, factors=[1], saving=SavingConfig(folder=tmp_path), progress=False)
    assert list(found) == [1]
