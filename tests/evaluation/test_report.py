"""The whole report: tables beside their controls, JSON, the page, models without logits, both classes of model."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from tests.marks import needs_bridge, needs_hooked_transformer
from tests.tiny import decomposition_of, some_tokens, tiny_model
from tl_vpd import Evaluation, EvaluationConfig, VPDConfig, bundled, evaluate
from tl_vpd.evaluation import MEASURES
from tl_vpd.evaluation import checks as evaluation_checks
from tl_vpd.toys.recipes import TOYS
from tl_vpd.training import new_decomposition
from tl_vpd.viz import evaluation_page

TABLES = {
    "adversaries", "union_test", "mask_transfer", "hidden", "sparsity_sweep", "cancelling", "off_distribution",
    "future_leakage", "feature_splitting", "consistency",
}  # fmt: skip


@pytest.fixture(scope="module")
def found() -> Evaluation:
    model = tiny_model(torch.float32)
    return evaluate(
        decomposition_of(model),
        model,
        some_tokens(shape=(6, 8)),
        EvaluationConfig(budgets=(2,), control_budgets=(1,), adversary_budgets=(1,), attack_rows=4, batch_size=4),
        off_distribution={"other": some_tokens(seed=5, shape=(4, 6))},
        others={"seed 1": decomposition_of(model, seed=1)},
    )


def test_every_table_stands_beside_its_controls(found: Evaluation):
    assert set(found.record["tables"]) == TABLES and found.record["left_out"] == {}
    for name in ("adversaries", "union_test", "mask_transfer", "hidden", "sparsity_sweep"):
        assert set(found.to_pandas(name)["pieces"]) == {"learned", "random", "singular", "shuffled", "untrained"}, name
    assert {"random", "shuffled"} <= set(found.to_pandas("off_distribution").columns)
    assert {"random pieces", "singular pieces", "shuffled pieces", "low", "high"} <= set(found.table().columns)
    assert list(found.to_pandas("off_distribution")["data"]) == ["these rows", "scrambled", "other"]
    record = found.record
    low, high = record["intervals"]["kl"]["rounded"]
    assert low <= record["kl"]["rounded"] <= high
    # The table and the record are two views of one measurement.
    sweep = found.to_pandas("sparsity_sweep").query("pieces == 'learned'").set_index("threshold")
    assert sweep.loc[0.0, "kl"] == pytest.approx(record["kl"]["rounded"])
    assert sweep.loc[0.5, "kl"] == pytest.approx(record["kl"]["rounded_0.5"])
    assert sweep.loc[0.0, "l0"] == pytest.approx(record["l0"])
    transfer = found.to_pandas("mask_transfer").query("pieces == 'learned'").set_index("replaced")
    assert transfer.loc["error-propagating", "kl"] == pytest.approx(record["kl"]["rounded"])
    attacks = found.to_pandas("adversaries").query("pieces == 'learned' and adversary == 'shared'")
    assert list(attacks["kl"]) == [record["pgd_kl"]["2"]] and record["pgd_tokens"] == 32


def test_it_goes_through_json(found: Evaluation, tmp_path: Path):
    found.save(tmp_path / "metrics.json")
    json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)
    again = Evaluation.load(tmp_path / "metrics.json")
    assert again.warnings == found.warnings
    assert again.table().equals(found.table())
    assert again.to_pandas("mask_transfer").equals(found.to_pandas("mask_transfer"))


def test_the_page_stands_alone(found: Evaluation, tmp_path: Path):
    path = evaluation_page(found, tmp_path / "report.html", title="Of a <tiny> model")
    text = path.read_text(encoding="utf-8")
    assert "Of a &lt;tiny&gt; model" in text
    for sentence in found.warnings:
        assert sentence.split(":")[0] in text
    assert "<svg" in text and "Union test" in text
    assert not re.search(r"(?:src|href)=[\"']https?:", text)
    assert path.read_bytes() == evaluation_page(found, tmp_path / "again.html", title="Of a <tiny> model").read_bytes()


def test_what_was_not_asked_for_is_not_measured_and_says_so():
    model = tiny_model(torch.float32)
    vpd, tokens = decomposition_of(model), some_tokens(shape=(1, 2))
    few = evaluate(vpd, model, tokens, EvaluationConfig(budgets=(), controls=False, measures=()))
    assert few.record["tables"] == {} and few.record["pgd_kl"] == {}
    with pytest.raises(KeyError, match="no table 'mask_transfer'"):
        few.to_pandas("mask_transfer")
    config = EvaluationConfig(budgets=(), controls=False, measures=("future_leakage", "union_test"))
    rest = evaluate(vpd, model, tokens, config)
    with pytest.raises(KeyError, match="'future_leakage' was left out: the rows are shorter"):
        rest.to_pandas("future_leakage")
    assert "a pair needs two" in rest.record["left_out"]["union_test"]
    with pytest.raises(ValueError, match="The report itself uses the name scrambled"):
        evaluate(vpd, model, tokens, off_distribution={"scrambled": tokens})


def test_a_toy_is_judged_by_squared_errors(tmp_path: Path):
    toy = TOYS["tms_5_2"]
    model = toy.build(0)
    vpd = new_decomposition(model, VPDConfig(C=6, output="mse", gamma={"kind": "per_subcomponent_mlps", "hidden": 4}))
    x = toy.batches(32, seed=0).at(0)
    config = EvaluationConfig(budgets=(2,), adversary_budgets=(1,), control_budgets=(1,), batch_size=16)
    found = evaluate(vpd, model, x, config)
    record = found.record
    assert record["output"] == "mse" and "target_ce" not in record and record["compute_recovered"] == {}
    with torch.no_grad(), vpd.attach(model) as attached, attached.masked("zero"):
        zero = (model(x) - toy.build(0)(x)).square().mean()
    assert record["kl"]["zero"] == pytest.approx(float(zero), rel=1e-4)
    assert "mse" in found.table().columns and "ce" not in found.table().columns
    assert record["left_out"] == {
        "off_distribution": "no other data was passed",
        "future_leakage": "the model returns no next-token predictions",
    }
    evaluation_page(found, tmp_path / "toy.html")
    assert all(isinstance(s, str) for s in found.warnings)


@needs_bridge
@needs_hooked_transformer
def test_padding_is_left_out_on_either_class_of_model():
    vpd = bundled.decomposition()
    texts = ["def f(x):\n    return x + 1\n", "import os\n"]
    records = []
    for kind in ("hooked_transformer", "bridge"):
        model = bundled.model(kind=kind)  # type: ignore[arg-type]
        tokens = model.to_tokens(texts)
        config = EvaluationConfig(budgets=(1,), adversary_budgets=(1,), controls=False, measures=MEASURES)
        found = evaluate(vpd, model, tokens, config).record
        alone = [vpd.causal_importances(model, t).concatenated for t in texts]
        assert found["tokens"] == sum(g.shape[1] for g in alone)
        l0 = sum(float((g > 0).sum()) for g in alone) / found["tokens"]
        assert found["l0"] == pytest.approx(l0, rel=1e-3)
        assert found["left_out"] == {} and 4 <= found["leak_tokens"] <= 8
        records.append(found)
    one, two = records
    assert one["kl"]["rounded"] == pytest.approx(two["kl"]["rounded"], rel=1e-3)
    assert one["leak"] == pytest.approx(two["leak"], abs=1e-3)
    for a, b in zip(one["tables"]["hidden"], two["tables"]["hidden"], strict=True):
        assert a["error"] == pytest.approx(b["error"], rel=1e-2), a["what"]


@pytest.mark.parametrize(
    "kind",
    [pytest.param("hooked_transformer", marks=needs_hooked_transformer), pytest.param("bridge", marks=needs_bridge)],
)
def test_the_model_is_left_as_it_was(kind: str):
    model = bundled.model(kind=kind)  # type: ignore[arg-type]
    model.train()
    tokens = bundled.tokens("validation")[:2, :12]
    fired: list[str] = []
    name = "blocks.0.attn.hook_pattern"
    model(tokens)  # a bridge adds hooks in its first pass
    model.add_hook(name, lambda value, hook: fired.append(name))
    hooks = {n: (dict(m._forward_hooks), dict(m._forward_pre_hooks)) for n, m in model.named_modules()}
    flags = {n: (p.requires_grad, p.grad) for n, p in model.named_parameters()}
    config = EvaluationConfig(budgets=(1,), adversary_budgets=(1,), control_budgets=(1,))
    evaluate(bundled.decomposition(), model, tokens, config)
    assert fired == []  # users' hooks are set aside: the target itself is measured
    assert hooks == {n: (dict(m._forward_hooks), dict(m._forward_pre_hooks)) for n, m in model.named_modules()}
    assert flags == {n: (p.requires_grad, p.grad) for n, p in model.named_parameters()}
    assert model.training
    model(tokens)
    assert fired == [name]
    model.reset_hooks()
    model(tokens)
    assert fired == [name]


def test_inference_mode_changes_nothing():
    toy = TOYS["tms_5_2"]
    model, x = toy.build(0), toy.batches(4, seed=0).at(0)
    vpd = new_decomposition(model, VPDConfig(C=6, output="mse", gamma={"kind": "per_subcomponent_mlps", "hidden": 4}))
    config = EvaluationConfig(budgets=(2,), adversary_budgets=(1,), controls=False, measures=("adversaries",))
    expected = evaluate(vpd, model, x, config).record
    with torch.inference_mode():
        found = evaluate(vpd, model, x.clone(), config).record
    assert found["kl"] == pytest.approx(expected["kl"]) and found["pgd_kl"] == pytest.approx(expected["pgd_kl"])


def test_what_does_not_fit_beside_is_refused_before_anything_is_measured(monkeypatch):
    model = tiny_model(torch.float32)
    vpd, tokens = decomposition_of(model), some_tokens()
    module = sys.modules["tl_vpd.evaluation.evaluate"]
    monkeypatch.setattr(module, "record_of", lambda *a, **k: pytest.fail("measured"))
    with pytest.raises(ValueError, match="Decomposition 'o': These are not decompositions of the same weights"):
        evaluate(vpd, model, tokens, others={"o": decomposition_of(model, sites="*.W_Q")})
    with pytest.raises(ValueError, match="Data 'x': Tokens run from"):
        evaluate(vpd, model, tokens, off_distribution={"x": tokens + 100})


def test_stored_reports_load_with_their_names_of_today(tmp_path: Path):
    figures = ("l0", "alive", "built", "tokens", "summed_rank")
    by_name = ("compute_recovered", "pgd_kl", "pgd_kl_starts", "l0_by_site", "alive_by_site", "built_by_site")
    stored = {
        **dict.fromkeys(figures, 1),
        **{name: {} for name in by_name},
        "kl": {"zero": 1.0},
        "tables": {
            "aggregation": [{"pieces": "learned", "inputs": 2, "kl_alone": 0.1, "kl_union": 0.9}],
            "transfer": [{"replaced": "clean-input", "kl": 0.2}],
            "resolution": [{"threshold": 0.5, "kl": 0.3}],
            "slices": [{"slice": "these rows", "share_of_zero": 0.01}, {"slice": "prose", "share_of_zero": 0.9}],
            "foresight": [{"position": 3, "whole_ce": 2.0}],
            "sizes": [{"size": "this", "built": 6}],
            "hidden": [{"what": "blocks.0.mlp.W_in", "error": 0.5}],
        },
        "left_out": {"foresight": "some rows are padded", "consistency": "there is one"},
    }
    (tmp_path / "old.json").write_text(json.dumps(stored))
    report = Evaluation.load(tmp_path / "old.json")
    assert report.to_pandas("union_test").loc[0, "kl_union"] == 0.9
    assert report.to_pandas("mask_transfer").loc[0, "kl"] == 0.2
    assert report.to_pandas("sparsity_sweep").loc[0, "kl"] == 0.3
    assert list(report.to_pandas("off_distribution")["data"]) == ["these rows", "prose"]
    assert report.to_pandas("future_leakage").loc[0, "whole_ce"] == 2.0
    assert report.to_pandas("feature_splitting").loc[0, "decomposition"] == "this"
    assert report.to_pandas("hidden").loc[0, "error"] == 0.5
    assert report.record["left_out"] == {"future_leakage": "some rows are padded", "consistency": "there is one"}
    shipped = bundled.evaluation()
    assert {check.check for check in evaluation_checks(shipped)} == {
        "explained",
        "dense",
        "delta",
        "adversary",
        "controls",
        "collapsed",
        "lookup",
        "cancelling",
        "leak",
    }
    assert shipped.warnings == []
