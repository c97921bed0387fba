"""Every known way to be wrong is caught by its check, and the right decomposition of the same model passes it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from tests.evaluation import handmade
from tests.evaluation.handmade import IN, KNOWN, VOCABULARY, one_token_rows, rows
from tl_vpd import Decomposition, EvaluationConfig, evaluate
from tl_vpd.evaluation import Check, Evaluation, checks, warnings_of

MEASURES = ("union_test", "cancelling", "off_distribution", "future_leakage")


@pytest.fixture(scope="module")
def model() -> Any:
    return handmade.known_model()


def report(
    vpd: Decomposition, model: Any, tokens: torch.Tensor | None = None, *, budgets: tuple[int, ...] = ()
) -> Evaluation:
    return evaluate(
        vpd,
        model,
        rows() if tokens is None else tokens,
        EvaluationConfig(budgets=budgets, control_budgets=(), measures=MEASURES),
        off_distribution={"unknown tokens": one_token_rows(KNOWN, VOCABULARY)},
    )


@pytest.fixture(scope="module")
def right(model: Any) -> Evaluation:
    return report(handmade.right(model), model, budgets=(20,))


def faults(found: Evaluation) -> set[str]:
    return {check.check for check in checks(found) if check.fault}


def test_the_right_decomposition_passes_every_check(right: Evaluation):
    names = [check.check for check in checks(right)]
    assert names == [
        "collapsed", "explained", "dense", "delta", "cancelling", "adversary", "leak", "union test", "off-distribution",
        "lookup", "controls",
    ]  # fmt: skip
    assert warnings_of(right) == [] == right.warnings
    record = right.record
    assert record["kl"]["zero"] > 0.5
    # It is exact under every masking: nothing that may be ablated matters.
    for mode in ("unmasked", "stochastic", "rounded", "partial"):
        assert record["kl"][mode] < 1e-5
    assert record["pgd_kl"]["20"] < 1e-5
    assert 0.05 < record["l0"] / record["alive"] < 0.5


def test_cancelling_pairs(model: Any, right: Evaluation):
    result = report(handmade.with_opposed(model, pairs=1, size=2.0), model)
    assert result.record["kl"]["rounded"] < 1e-5  # together they may go
    assert "cancelling" in faults(result) and "cancelling" not in faults(right)
    sentence = next(c.sentence for c in checks(result) if c.check == "cancelling")
    assert f"{IN}:16 and {IN}:17 cancel" in sentence
    assert "left out together but not in part" in sentence


def test_important_subcomponents_that_explain_nothing(model: Any, right: Evaluation):
    """One of them is important everywhere and the rest nowhere: no control is needed to see that nothing is explained."""

    def one_alone(g: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(g).index_fill(-1, torch.tensor([0]), 1.0)

    result = report(handmade.with_importances(model, one_alone), model)
    assert result.record["kl"]["rounded"] > 0.8 * result.record["kl"]["zero"]
    assert "explained" in faults(result) and "explained" not in faults(right)
    assert "collapsed" not in faults(result)
    sentence = next(c.sentence for c in checks(result) if c.check == "explained")
    assert sentence.startswith("What is called important explains little of the output: ")


def test_importances_that_see_the_next_token(model: Any, right: Evaluation):
    result = report(handmade.peeking(model), model)
    record = result.record
    assert (
        record["rounded_ce"] < record["target_ce"] - 0.05
    )  # better than the model itself, which the KL does not praise
    assert record["leak"]["rounded"] > 0.05 and record["kl"]["rounded"] > 0
    assert "leak" in faults(result) and "leak" not in faults(right)
    sentence = next(c.sentence for c in checks(result) if c.check == "leak")
    assert sentence.startswith("Masked cross-entropies see the next token: importances from the prefix alone cost ")
    assert abs(right.record["leak"]["rounded"]) < 1e-6 and right.record["importance_change"] == 0


def test_lookup_table(model: Any):
    tokens = one_token_rows(0, KNOWN)
    result = report(handmade.lookup_table(model), model, tokens)
    assert result.record["kl"]["rounded"] < 1e-5  # on what it was made for it is perfect
    assert {"union test", "off-distribution", "lookup"} <= faults(result)
    beside = report(handmade.right(model), model, tokens)
    assert not {"union test", "off-distribution", "lookup"} & faults(beside)
    sentences = " ".join(result.warnings)
    assert "lookup table: 100% of all importance" in sentences
    assert "'unknown tokens'" in sentences
    assert "Explanations do not add up" in sentences


def test_delta_does_the_work(model: Any, right: Evaluation):
    result = report(handmade.delta_does_it(model), model)
    assert "delta" in faults(result) and "delta" not in faults(right)
    assert "Δ has 81.0% of the square of" in next(c.sentence for c in checks(result) if c.check == "delta")


def test_importances_that_are_all_zero(model: Any):
    result = report(handmade.with_importances(model, torch.zeros_like), model)
    assert "collapsed" in faults(result)
    assert result.warnings[0] == "Importances have collapsed: all of them are 0 on these tokens."


def test_importances_below_one_everywhere(model: Any, right: Evaluation):
    result = report(handmade.with_importances(model, lambda on: 0.6 * on), model)
    assert "collapsed" in faults(result) and "collapsed" not in faults(right)
    assert "(the largest is 0.60)" in result.warnings[0]


def test_a_dense_one(model: Any, right: Evaluation):
    result = report(handmade.with_importances(model, torch.ones_like), model)
    assert {"dense", "controls"} <= faults(result) and "dense" not in faults(right)
    assert result.record["kl"]["rounded"] < 1e-5
    # Everything is on at every token, so importances in any other hands do as well.
    assert "hardly better than chance" in next(c.sentence for c in checks(result) if c.check == "controls")


def test_what_no_adversary_has_seen(model: Any, right: Evaluation):
    # Many small opposed pieces: chance cancels them, an adversary lines them up.
    result = report(handmade.with_opposed(model, pairs=1500, size=0.0015), model, budgets=(20,))
    record = result.record
    z = record["kl"]["zero"]
    assert max(record["kl"][mode] for mode in ("rounded", "stochastic", "partial", "ci")) < 0.1 * z
    assert record["pgd_kl"]["20"] > 0.5 * z
    assert "adversary" in faults(result) and "adversary" not in faults(right)
    assert "cancelling" not in faults(result)
    assert any(s.startswith("It survives chance but not an adversary") for s in result.warnings)


def test_a_verdict_needs_no_more_than_the_json(right: Evaluation, model: Any):
    dense = report(handmade.with_importances(model, torch.ones_like), model)
    for result in (right, dense):
        assert warnings_of(json.loads(json.dumps(result.record))) == result.warnings
    # What was not measured is not judged.
    few = {k: v for k, v in right.record.items() if k not in ("tables", "importances", "controls")}
    assert [c.check for c in checks(few)] == ["explained", "dense", "delta", "cancelling", "adversary", "leak"]


@pytest.mark.parametrize("missing", [None, float("nan"), float("inf")])
def test_what_is_not_defined_is_said_and_not_judged(right: Evaluation, missing: float | None):
    def check_of(name: str, **changes: Any) -> Check:
        return next(check for check in checks({**right.record, **changes}) if check.check == name)

    data = [{"data": "these rows", "share_of_zero": 0.1}, {"data": "silent", "share_of_zero": missing}]
    union = [{"pieces": "learned", "inputs": 2, "kl_union": missing, "kl_alone": 0.1}]
    why = {"left_out": {"kl.rounded": "it is not a finite number"}}
    undefined = [
        check_of("off-distribution", tables={"off_distribution": data}),
        check_of("off-distribution", tables={"off_distribution": data[::-1]}),
        check_of("union test", tables={"union_test": union}),
        check_of("cancelling", kl={**right.record["kl"], "rounded": missing}, **why),
        check_of("adversary", pgd_kl={"20": missing}),
        check_of("delta", kl={**right.record["kl"], "zero": missing}),
        check_of("controls", controls={"random": {"kl": {"rounded": missing}}}),
        check_of("collapsed", importances={**right.record["importances"], "tokens_at_1": missing}),
    ]
    for check in undefined:
        assert (check.value, check.limit, check.fault) == (None, None, False)
        assert check.sentence.startswith("Not measured: ") and "nan" not in check.sentence
    assert undefined[3].sentence == "Not measured: kl.rounded (it is not a finite number)."
    # What is undefined on one set of rows does not hide another.
    far = check_of("off-distribution", tables={"off_distribution": [*data, {"data": "far", "share_of_zero": 0.9}]})
    assert far.fault and "'far'" in far.sentence
