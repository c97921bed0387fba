"""Targeted decompositions on other data: Δ is on there, by hand, and the report says what it leaves out."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import decomposition_of, some_tokens, tiny_model
from tests.training.functional_target import FunctionalTarget
from tl_vpd.evaluation import EvaluationConfig, checks, evaluate, nontarget
from tl_vpd.publishing.figures import evaluation_section
from tl_vpd.viz import evaluation_page

SITE = "blocks.1.mlp.W_in"
QUICK = EvaluationConfig(measures=("off_distribution",), budgets=(), controls=False)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def vpd(model):
    vpd = decomposition_of(model, sites=(SITE,)).double()
    vpd.record["targeted"] = {"target": {}, "nontarget": {}}
    return vpd


def test_distances_are_those_of_edited_weights(model, vpd):
    tokens = some_tokens(seed=3, shape=(5, 7))
    table = nontarget(vpd, model, {"other": tokens}, EvaluationConfig(batch_size=2)).loc["other"]
    target, real = FunctionalTarget(model, [SITE]), torch.ones_like(tokens, dtype=torch.bool)
    g = vpd.causal_importances(model, tokens)[SITE]
    log_p = model(tokens).log_softmax(-1)

    def by_token(m):
        def site(name, x):
            off = ((x @ vpd.V[name]) * (1 - m)) @ vpd.U[name]  # W − Σ (1 − m_c) V[:, c] U[c]: the rest is on
            return target.clean(name, x) - off

        log_q = target(tokens, real, site).log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1).detach()

    for mode, m in {"rounded": (g > 0).double(), "ablated": torch.zeros_like(g)}.items():
        expected = by_token(m)
        assert table.loc[mode, "distance"] == pytest.approx(float(expected.mean()), rel=1e-5)
        assert table.loc[mode, "p99"] == pytest.approx(float(expected.flatten().quantile(0.99)), rel=1e-5)
        assert table.loc[mode, "largest"] == pytest.approx(float(expected.max()), rel=1e-5)
    assert 0 < table.loc["stochastic", "distance"] < table.loc["ablated", "distance"]
    assert (table["tokens"] == 35).all() and table["l0"].iloc[0] == pytest.approx(
        float((g > 0).sum(-1).double().mean())
    )


def test_the_report_of_a_targeted_decomposition(model, vpd, tmp_path):
    tokens = some_tokens(shape=(4, 6))
    report = evaluate(vpd, model, tokens, QUICK, off_distribution={"other": some_tokens(seed=5, shape=(3, 9))})
    left_out = report.record["left_out"]
    for name in ("faithfulness", "delta_share", "off_distribution"):
        assert left_out[name].startswith("the decomposition is targeted") and name not in report.record["tables"]
    assert set(report.to_pandas("nontarget")["mode"]) == {"stochastic", "rounded", "ablated"}
    page, card = evaluation_page(report, tmp_path / "page.html").read_text(), evaluation_section(report)
    assert "Other data, with Δ on" in page and "### Other data" in card and card.count("| ablated |") == 1
    assert "faithfulness" not in report.record and checks(report)
    assert evaluate(vpd, model, tokens, QUICK).record["left_out"]["nontarget"] == "no other data was passed"


def test_data_is_given_by_name(model, vpd):
    with pytest.raises(ValueError, match=r"data=\{\}"):
        nontarget(vpd, model, {})
    with pytest.raises(ValueError, match="Data 'wrong': "):
        nontarget(vpd, model, {"wrong": torch.tensor([[99, 1]])})
