from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.tiny import GAMMA, decomposition_of, some_tokens, tiny_model
from tl_vpd.evaluation import EvaluationConfig, evaluate, future_leakage, sampled
from tl_vpd.evaluation.batch import BatchStore, Rows
from tl_vpd.evaluation.future_leakage import MODES, spread_positions
from tl_vpd.evaluation.future_leakage import leakage as leakage_of_rows
from tl_vpd.forward import MaskedModel
from tl_vpd.losses import kl_divergence

TWO_WAY = {**GAMMA, "causal": False}


def leakage(vpd, model, tokens, *, positions, batch_size=16, **options):
    with sampled(vpd, model, tokens, batch_size=batch_size) as sample:
        return future_leakage(sample, positions=positions, **options)


@pytest.mark.parametrize("batch_size", [2, 16])
def test_last_prefix_is_the_whole_window_and_others_are_not(batch_size):
    model = tiny_model(torch.float32)
    vpd, tokens = decomposition_of(model, gamma=TWO_WAY), some_tokens(shape=(5, 8))
    table = leakage(vpd, model, tokens, positions=[2, 6], batch_size=batch_size).loc["rounded"]
    with torch.no_grad():
        for position in (2, 6):
            clean = F.cross_entropy(model(tokens)[:, position], tokens[:, position + 1])
            assert table.loc[position, "target_ce"] == pytest.approx(float(clean), rel=1e-5)
            with vpd.attach(model) as attached, attached.masked("rounded"):
                prefix = model(tokens[:, : position + 1])[:, -1:]
                whole = model(tokens)[:, position : position + 1]
            for name, logits in (("prefix", prefix), ("whole", whole)):
                ce = F.cross_entropy(logits[:, 0], tokens[:, position + 1])
                assert table.loc[position, f"{name}_ce"] == pytest.approx(float(ce), rel=1e-5)
                target = model(tokens)[:, position : position + 1].log_softmax(-1)
                assert table.loc[position, f"{name}_kl"] == pytest.approx(
                    float(kl_divergence(target, logits)), rel=1e-4
                )
    assert (table["whole_kl"] != table["prefix_kl"]).all()
    assert list(table["leak"]) == pytest.approx(list(table["prefix_ce"] - table["whole_ce"]))
    importances = vpd.causal_importances(model, tokens).concatenated
    for position in (2, 6):
        prefix = vpd.causal_importances(model, tokens[:, : position + 1]).concatenated
        change = float((importances[:, : position + 1] - prefix).abs().max())
        assert table.loc[position, "importance_change"] == pytest.approx(change, rel=1e-4)


def test_a_causal_importance_function_leaks_nothing_in_any_mode():
    model = tiny_model(torch.float32)
    tokens = some_tokens(shape=(5, 8))
    table = leakage(decomposition_of(model), model, tokens, positions=[2, 4, 6], modes=MODES)
    assert set(table.index.get_level_values("mode")) == set(MODES)
    assert table["leak"].abs().max() < 1e-5 and table["importance_change"].max() < 1e-5
    config = EvaluationConfig(measures=("future_leakage",), budgets=(), controls=False, leak_rows=3, leak_positions=2)
    causal, two_way = (
        evaluate(decomposition_of(model, gamma=gamma), model, tokens, config) for gamma in (GAMMA, TWO_WAY)
    )
    assert set(causal.record["leak"]) == {"rounded", "ci", "stochastic"} == set(causal.table()["leak"].dropna().index)
    assert max(abs(leak) for leak in causal.record["leak"].values()) < 1e-5
    assert causal.record["leak_tokens"] == 6 and causal.record["importance_change"] < 1e-5
    assert list(causal.to_pandas("future_leakage")["position"]) == [3, 6] * 3
    assert two_way.record["importance_change"] > 0.01
    sentences = [r.checks().loc["leak", "sentence"] for r in (causal, two_way)]
    assert sentences[0].startswith("Importances depend on the prefix alone")
    assert "the prefix alone" in sentences[1] and not sentences[1].startswith("Importances depend")


def test_padded_rows_are_measured_where_they_have_a_next_token():
    """Each row alone, without its padding, gives the same figures."""
    model = tiny_model(torch.float32)
    vpd, tokens = decomposition_of(model, gamma=TWO_WAY), some_tokens(shape=(3, 8))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, 5:] = False
    with sampled(vpd, model, tokens) as sample:
        padded = replace(sample, rows=Rows(tokens, mask, [0, 1, 2]), store=BatchStore(0))
        result = leakage_of_rows(padded, positions=[2, 5], modes=["rounded"])
        assert spread_positions(padded, 3) == [2, 4, 6]
    figures = result.figures["rounded"]
    assert np.isnan(figures["whole_ce"]).tolist() == [[False, False], [False, True], [False, False]]
    assert result.leak("rounded").tokens.tolist() == [2, 1, 2]
    alone = leakage(vpd, model, tokens[1:2, :5], positions=[2]).loc[("rounded", 2)]
    for name in ("target_ce", "whole_ce", "prefix_ce", "whole_kl", "prefix_kl"):
        assert figures[name][1, 0] == pytest.approx(alone[name], rel=1e-4)
    table = result.to_pandas().loc["rounded"]
    assert list(table["rows"]) == [3, 2]
    assert table.loc[5, "prefix_ce"] == pytest.approx(figures["prefix_ce"][[0, 2], 1].mean())


@pytest.mark.parametrize("mode", ["rounded", "stochastic"])
def test_without_an_attending_importance_function_nothing_leaks(mode):
    model = tiny_model(torch.float32)
    vpd = decomposition_of(model, gamma={"kind": "per_subcomponent_mlps", "hidden": 4})
    table = leakage(vpd, model, some_tokens(shape=(4, 8)), positions=[1, 5], modes=[mode])
    assert list(table["whole_kl"]) == pytest.approx(list(table["prefix_kl"]), rel=1e-4, abs=1e-7)


def test_a_position_without_a_next_token_and_other_modes_are_refused():
    model = tiny_model(torch.float32)
    vpd, tokens = decomposition_of(model), some_tokens(shape=(2, 8))
    with pytest.raises(IndexError, match=r"\[7\] have no next token"):
        leakage(vpd, model, tokens, positions=[3, 7])
    with pytest.raises(ValueError, match=r"modes\[0\]='zero': choose from 'rounded'"):
        leakage(vpd, model, tokens, positions=[3], modes=["zero"])
    with pytest.raises(ValueError, match=r"modes=\[\]: give at least one"):
        leakage(vpd, model, tokens, positions=[3], modes=[])
    with pytest.raises(ValueError, match="the rows are shorter than three tokens"):
        leakage(vpd, model, tokens[:, :2], positions=[0])


def test_what_is_attached_already_does_not_matter():
    model = tiny_model(torch.float32)
    vpd, tokens = decomposition_of(model), some_tokens(shape=(4, 8))
    expected = leakage(vpd, model, tokens, positions=[2])
    quick = EvaluationConfig(measures=("future_leakage",), budgets=(), controls=False)
    with vpd.attach(model) as attached, attached.masked("zero"):
        assert leakage(vpd, model, tokens, positions=[2]).equals(expected)
    with vpd.attach(model, sites="*.mlp.*"):
        assert leakage(vpd, model, tokens, positions=[2]).equals(expected)
        assert "future_leakage" in evaluate(vpd, model, tokens, quick).record["tables"]


def test_figures_are_measured_in_float32():
    model = tiny_model(torch.bfloat16)
    vpd, tokens = decomposition_of(model), some_tokens(shape=(4, 8))
    with torch.no_grad(), MaskedModel(vpd, model) as masked_model:
        expected = F.cross_entropy(masked_model.clean(tokens)[0][:, 2].float(), tokens[:, 3])
    table = leakage(vpd, model, tokens, positions=[2])
    assert table.loc[("rounded", 2), "target_ce"] == pytest.approx(float(expected), rel=1e-6)
