"""The record of an evaluation against an independent computation on a tiny model."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor

from tests.tiny import decomposition_of, tiny_model
from tl_vpd import Decomposition, EvaluationConfig, evaluate
from tl_vpd.adapters import adapt

KEYS = {
    "target_ce", "unmasked_ce", "stochastic_ce", "rounded_ce", "rounded_0.1_ce", "rounded_0.5_ce", "ci_ce", "zero_ce",
    "l0", "l0_by_site", "alive", "alive_1e-4", "built", "summed_rank", "tokens", "pgd_kl", "kl", "compute_recovered",
}  # fmt: skip


@pytest.fixture
def setting() -> tuple[Decomposition, torch.nn.Module, Tensor]:
    model = tiny_model(torch.float32)
    vpd = decomposition_of(model, C=10)
    tokens = torch.randint(0, model.cfg.d_vocab, (6, 8), generator=torch.Generator().manual_seed(1))
    return vpd, model, tokens


def edited(model, vpd: Decomposition, mask: float) -> torch.nn.Module:
    """A copy whose weights are ``mask`` times the subcomponents, without Δ."""
    other = copy.deepcopy(model)
    for name in vpd.sites:
        adapt(other).set_weight(name, mask * vpd.V[name].detach() @ vpd.U[name].detach())
    return other


def ce(model, tokens: Tensor) -> float:
    log_p = model(tokens).log_softmax(-1)[:, :-1]
    return float(-log_p.gather(-1, tokens[:, 1:, None]).mean())


def test_record(setting):
    vpd, model, tokens = setting
    config = EvaluationConfig(budgets=(3, 6), starts={3: 2, 6: 2}, control_budgets=(3,), batch_size=4, measures=())
    record = evaluate(vpd, model, tokens, config).record
    assert {*KEYS, "controls", "target_params_max_change", "faithfulness"} <= set(record)
    json.dumps(record)
    with torch.no_grad():
        assert record["target_ce"] == pytest.approx(ce(model, tokens), rel=1e-5)
        assert record["unmasked_ce"] == pytest.approx(ce(edited(model, vpd, 1.0), tokens), rel=1e-4)
        assert record["zero_ce"] == pytest.approx(ce(edited(model, vpd, 0.0), tokens), rel=1e-5)
    importances = vpd.causal_importances(model, tokens)
    assert record["l0"] == pytest.approx(float(importances.l0.float().mean()), rel=1e-5)
    for name, g in importances.items():
        assert record["l0_by_site"][name] == pytest.approx(float((g > 0).float().sum(-1).mean()), rel=1e-5)
    mean = importances.concatenated.mean((0, 1))
    assert record["alive"] == int((mean > 1e-6).sum())
    assert record["alive_1e-4"] == int((mean > 1e-4).sum())
    assert record["built"] == 10 * len(vpd.sites)
    assert record["summed_rank"] == sum(min(s.d_in, s.d_out) for s in vpd.sites.values())
    assert record["tokens"] == 48
    assert record["target_params_max_change"] == 0
    assert set(record["pgd_kl"]) == {"3", "6"}
    for budget, starts in record["pgd_kl_starts"].items():
        assert len(starts) == 2 and record["pgd_kl"][budget] == max(starts)
    # An adversary may do whatever chance does, and looks for worse.
    assert record["pgd_kl"]["6"] > record["kl"]["stochastic"]
    for control in ("random", "singular"):
        assert set(record["controls"][control]) >= KEYS
        assert record["controls"][control]["pgd_kl"].keys() == {"3"}
    assert record["controls"]["random"]["l0"] == pytest.approx(record["l0"], rel=1e-5)
    # All singular directions are the weight itself.
    assert record["controls"]["singular"]["unmasked_ce"] == pytest.approx(record["target_ce"], rel=1e-4)


def test_importances_are_summed_up_as_their_names_say(setting):
    vpd, model, tokens = setting
    shape = evaluate(vpd, model, tokens, EvaluationConfig(budgets=(), controls=False, batch_size=4, measures=())).record
    g = vpd.causal_importances(model, tokens).concatenated
    assert shape["importances"]["largest"] == pytest.approx(float(g.max()))
    assert shape["importances"]["at_1"] == pytest.approx(float((g >= 0.99).sum() / (g > 0).sum()))
    assert shape["importances"]["tokens_at_1"] == pytest.approx(float((g >= 0.99).any(-1).float().mean()))
    one = ((g > 0).any(1).sum(0) == 1).float()
    assert shape["importances"]["one_row"] == pytest.approx(float((g.mean((0, 1)) * one).sum() / g.mean((0, 1)).sum()))


def test_same_seed_same_record(setting):
    vpd, model, tokens = setting
    config = EvaluationConfig(
        budgets=(2,),
        control_budgets=(2,),
        adversary_budgets=(1,),
        seed=3,
        measures=("adversaries", "union_test", "off_distribution"),
    )
    one, two = (evaluate(vpd, model, tokens, config).record for _ in range(2))
    assert one == two
    config = EvaluationConfig(budgets=(), controls=False, seed=4, measures=())
    assert evaluate(vpd, model, tokens, config).record["stochastic_ce"] != one["stochastic_ce"]


def test_tables(setting):
    vpd, model, tokens = setting
    config = EvaluationConfig(budgets=(2,), controls=False, measures=(), curve=[(0, 5.0), (10, 1.0)])
    report = evaluate(vpd, model, tokens, config)
    table = report.table()
    assert table.loc["zero", "share_of_zero"] == pytest.approx(1.0)
    above = report.record["rounded_ce"] - report.record["target_ce"]
    assert table.loc["rounded", "above_target"] == pytest.approx(above)
    assert "compute_recovered" in table
    assert list(report.pgd_table().index) == [2]
    assert report.sites_table()["built"].sum() == report.record["built"]


def test_empty_and_foreign_tokens_are_refused(setting):
    vpd, model, _ = setting
    with pytest.raises(ValueError, match="no tokens"):
        evaluate(vpd, model, torch.empty(0, 8, dtype=torch.long))
    with pytest.raises(ValueError, match="outside the vocabulary"):
        evaluate(vpd, model, torch.full((1, 4), model.cfg.d_vocab))


def test_another_models_weights_are_refused(setting):
    vpd, _, tokens = setting
    with pytest.raises(ValueError, match="weights are not the decomposed ones"):
        evaluate(vpd, tiny_model(torch.float32, seed=5), tokens)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"measures": ("mask_transfr",)}, KeyError, "did you mean 'mask_transfer'"),
        ({"attack_rows": 0}, ValueError, "attack_rows=0: give an integer of at least 1"),
        ({"batch_size": 0}, ValueError, "batch_size=0: give an integer of at least 1"),
        ({"budgets": (20,), "starts": {40: 3}}, ValueError, r"starts names \[40\]"),
    ],
)
def test_impossible_settings_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        EvaluationConfig(**settings)
