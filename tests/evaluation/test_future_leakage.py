from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.tiny import decomposition_of, some_tokens, tiny_model
from tl_vpd.evaluation import EvaluationConfig, evaluate, future_leakage, sampled
from tl_vpd.forward import MaskedModel
from tl_vpd.losses import kl_divergence


def leakage(vpd, model, tokens, *, positions, batch_size=16, **options):
    with sampled(vpd, model, tokens, batch_size=batch_size) as sample:
        return future_leakage(sample, positions=positions, **options)


@pytest.mark.parametrize("batch_size", [2, 16])
def test_last_prefix_is_the_whole_window_and_others_are_not(batch_size):
    model = tiny_model(torch.float32)
    vpd, tokens = decomposition_of(model), some_tokens(shape=(5, 8))
    table = leakage(vpd, model, tokens, positions=[2, 6], batch_size=batch_size)
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


@pytest.mark.parametrize("mode", ["rounded", "stochastic"])
def test_without_an_attending_importance_function_nothing_leaks(mode):
    model = tiny_model(torch.float32)
    vpd = decomposition_of(model, gamma={"kind": "per_subcomponent_mlps", "hidden": 4})
    table = leakage(vpd, model, some_tokens(shape=(4, 8)), positions=[1, 5], mode=mode)
    assert list(table["whole_kl"]) == pytest.approx(list(table["prefix_kl"]), rel=1e-4, abs=1e-7)


def test_a_position_without_a_next_token_and_other_modes_are_refused():
    model = tiny_model(torch.float32)
    vpd, tokens = decomposition_of(model), some_tokens(shape=(2, 8))
    with pytest.raises(IndexError, match=r"\[7\] have no next token"):
        leakage(vpd, model, tokens, positions=[3, 7])
    with pytest.raises(ValueError, match="mode='zero': choose from 'rounded'"):
        leakage(vpd, model, tokens, positions=[3], mode="zero")
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
    assert table.loc[2, "target_ce"] == pytest.approx(float(expected), rel=1e-6)
