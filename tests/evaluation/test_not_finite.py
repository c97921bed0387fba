"""Numbers that are NaN or infinite are said where they arise."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tl_vpd
from tl_vpd import Decomposition, analysis, viz
from tl_vpd.adapters.versions import HookedTransformer
from tl_vpd.analysis.metric import number_of
from tl_vpd.evaluation import Evaluation, EvaluationConfig
from tl_vpd.losses import faithfulness

IN = "blocks.1.mlp.W_in"
SHORT = EvaluationConfig(budgets=(1,), adversary_budgets=(1,), control_budgets=(1,))


@pytest.fixture
def damaged(vpd: Decomposition) -> Decomposition:
    """One number of V is NaN, so that outputs with masks are."""
    with torch.no_grad():
        vpd.V[IN][0, 2] = math.nan
    return vpd


def test_a_report_names_its_undefined_figures_and_is_json(
    damaged: Decomposition, model: HookedTransformer, tokens: Tensor, tmp_path: Path
):
    report = tl_vpd.evaluate(damaged, model, tokens, SHORT)
    assert report.record["kl"]["rounded"] is None
    assert report.record["left_out"]["kl.rounded"] == "it is not a finite number"
    assert "tables.union_test.kl_union" in report.record["left_out"]
    (sentence,) = [s for s in report.warnings if "NaN or infinite" in s]
    assert "kl.rounded" in sentence and "tables.union_test.kl_union" in sentence
    report.save(tmp_path / "metrics.json")
    text = (tmp_path / "metrics.json").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert Evaluation.load(tmp_path / "metrics.json").warnings == report.warnings
    page = viz.evaluation_page(report, tmp_path / "page.html").read_text()
    assert "kl.rounded, as it is not a finite number" in page


def test_a_finite_report_has_no_such_sentence(vpd: Decomposition, model: HookedTransformer, tokens: Tensor):
    report = tl_vpd.evaluate(vpd, model, tokens, SHORT)
    assert not [s for s in report.warnings if "NaN or infinite" in s]


def test_graphs_name_the_node(damaged: Decomposition, model: HookedTransformer, tokens: Tensor):
    with pytest.raises(FloatingPointError, match="Edges are not finite"):
        analysis.attribution_graph(damaged, model, tokens[:1], 3, config=analysis.GraphConfig(importances=False))
    with pytest.raises(FloatingPointError, match=f"Attributions to {IN}:2 are NaN"):
        analysis.dataset_graph(damaged, model, tokens, [f"{IN}:2", f"{IN}:3"])


def test_harvests_warn_and_name_the_subcomponent(damaged: Decomposition, model: HookedTransformer, tokens: Tensor):
    damaged.gamma.unembed.bias.data.fill_(1)  # every subcomponent fires
    with pytest.warns(RuntimeWarning, match=f"Importances or activations of 1 of 72 .* the first is {IN}:2"):
        harvested = analysis.harvest(damaged, model, tokens)
    record = harvested[f"{IN}:2"]
    assert math.isnan(record.mean_activation) and len(record.windows) == 2
    assert bool(record.windows[0].activations.isnan().all()) and record.windows[0].peak == record.windows[0].pos


def test_logits_that_are_not_finite_are_named(vpd: Decomposition, model: HookedTransformer, tokens: Tensor):
    with torch.no_grad():
        model.unembed.b_U[3] = math.nan
    with pytest.raises(FloatingPointError, match="logits at position 6 are NaN"):
        analysis.attribution_graph(vpd, model, tokens[:1], 3)
    with pytest.raises(FloatingPointError, match="logits at position 6 are NaN"):
        analysis.prune(vpd, model, tokens[:1], 3)


def log_of_nothing(logits: Tensor) -> Tensor:
    """−∞ for every model."""
    return (logits.sum() * 0).log()


def test_metrics_that_are_not_finite(vpd: Decomposition, model: HookedTransformer, tokens: Tensor):
    with pytest.warns(RuntimeWarning, match=r"NaN or infinite on the model itself, and on 1 of 1 ablated models"):
        table = analysis.ablation_table(vpd, model, tokens, log_of_nothing, [f"{IN}:1"])
    assert table["metric"].tolist() == [-math.inf]
    with pytest.raises(FloatingPointError, match="The metric is -inf on the model itself"):
        analysis.audit_circuit(vpd, model, tokens, [f"{IN}:1"], log_of_nothing)


def test_an_audit_of_a_metric_that_nothing_changes_says_so(
    vpd: Decomposition, model: HookedTransformer, tokens: Tensor
):
    config = analysis.AuditConfig(ablations=("zero",), controls=0)
    with pytest.warns(RuntimeWarning, match="0 for the whole model and with every node at the reference 'zero'"):
        audit = analysis.audit_circuit(vpd, model, tokens, [f"{IN}:1"], lambda logits: logits.sum() * 0, config=config)
    assert math.isnan(audit.rows["recovered"][0])
    with pytest.raises(ValueError, match="nothing to repair"):
        analysis.repair_circuit(vpd, model, tokens, [f"{IN}:1"], lambda logits: logits.sum() * 0)


@pytest.mark.parametrize("value", [3, 2.5, torch.tensor([1.5]), torch.tensor(2), math.nan])
def test_numbers_of_metrics(value: Any):
    assert number_of(value) == pytest.approx(float(value), nan_ok=True)


@pytest.mark.parametrize("value", [None, "3", True, torch.tensor(True), 1j, [1.0]])
def test_what_is_no_number_of_a_metric(value: Any):
    with pytest.raises(TypeError, match="one number is needed"):
        number_of(value)


def test_relative_faithfulness_names_a_matrix_of_zeros(vpd: Decomposition):
    zeros = torch.zeros(8, 12, dtype=torch.float64)
    assert float(faithfulness(vpd.components, {IN: zeros}).detach()) > 0
    with pytest.raises(ValueError, match=f"{IN} is a matrix of zeros"):
        faithfulness(vpd.components, {IN: zeros}, relative=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert float(faithfulness(vpd.components, {IN: zeros + 1}, relative=True).detach()) > 0
