"""Named sets of rows side by side."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.evaluation import handmade
from tests.evaluation.handmade import KNOWN, VOCABULARY, one_token_rows
from tests.tiny import decomposition_of, some_tokens, tiny_model
from tl_vpd.evaluation import (
    EvaluationConfig,
    compute_recovered,
    evaluate,
    off_distribution,
    sampled,
    scrambled,
    union_test,
)
from tl_vpd.evaluation.intervals import PerRow
from tl_vpd.evaluation.modes import rounded


def test_a_set_of_rows_is_what_the_sample_alone_would_be():
    model = tiny_model(torch.float32)
    vpd = decomposition_of(model)
    rows = {"one": some_tokens(seed=0, shape=(4, 7)), "other": some_tokens(seed=1, shape=(3, 5))}
    table = off_distribution(vpd, model, rows, EvaluationConfig(budgets=(2,), attack_rows=2))
    assert list(table.index) == ["one", "other"] and list(table["tokens"]) == [28, 15]
    for name, tokens in rows.items():
        with sampled(vpd, model, tokens) as sample:
            expected = sample.distances(rounded(sample))
            union = union_test(sample, sizes=(2,))
        assert table.loc[name, "rounded"] == pytest.approx(expected.mean, rel=1e-6)
        assert table.loc[name, "kl_union"] == pytest.approx(union.loc[2, "kl_union"], rel=1e-6)
    assert (table["share_of_zero"] == table["rounded"] / table["zero"]).all()
    assert (table["pgd_kl"] > 0).all()


def test_a_lookup_table_does_not_hold_on_unknown_tokens():
    model = handmade.known_model()
    rows = {"known": one_token_rows(0, KNOWN), "unknown": one_token_rows(KNOWN, VOCABULARY)}
    right, table = (
        off_distribution(vpd, model, rows, EvaluationConfig(budgets=()))
        for vpd in (handmade.right(model), handmade.lookup_table(model))
    )
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


def test_data_that_do_not_fit_are_named():
    model = tiny_model(torch.float32)
    with pytest.raises(ValueError, match="Data 'long': Sequences of 11 tokens"):
        off_distribution(decomposition_of(model), model, {"long": torch.zeros(1, 11, dtype=torch.long)})
    with pytest.raises(ValueError, match=r"data=\{\}: give rows of tokens by name"):
        off_distribution(decomposition_of(model), model, {})


def test_rows_of_one_token_have_no_cross_entropy_and_the_rest_is_measured():
    model = tiny_model(torch.float32)
    vpd, tokens = decomposition_of(model), some_tokens(shape=(4, 1))
    row = off_distribution(vpd, model, {"short": tokens}, EvaluationConfig(budgets=())).loc["short"]
    assert row["tokens"] == 4 and np.isnan(row["target_ce"]) and row["rounded"] >= 0
    report = evaluate(vpd, model, tokens, EvaluationConfig(budgets=(2,), measures=(), controls=False))
    assert report.record["target_ce"] is None and report.record["tokens"] == 4
    assert PerRow(np.array([1.0, 2.0]), np.zeros(2)).interval() == pytest.approx((np.nan, np.nan), nan_ok=True)
    assert np.isnan(compute_recovered(float("nan"), [(0, 3.0), (10, 1.0)]))
