"""A decomposition trained on without the adversary: plain measures stay fine, an attack says no.

The shipped decomposition is trained for a few steps more, with ten times the price of importances, once with the adversary and
once without: the same start, data, price and number of steps.
"""

from __future__ import annotations

from typing import Any

import pytest

from tl_vpd import bundled, evaluate
from tl_vpd.bundled.recipe import CONFIG
from tl_vpd.decomposition import Decomposition
from tl_vpd.evaluation import Evaluation, EvaluationConfig, checks
from tl_vpd.forward import MaskedModel
from tl_vpd.training import Coefficients, MinimalityConfig, Trainer

STEPS, ROWS, CONTEXT = 60, 8, 32


@pytest.fixture(scope="module")
def model() -> Any:
    return bundled.model()


def trained_on(model: Any, *, adversarial: float) -> Decomposition:
    vpd, tokens = bundled.decomposition(), bundled.tokens("training")
    weights = Coefficients(
        delta=1e5, importance=6e-3, frequency=0.0, stochastic=1 - adversarial, adversarial=adversarial
    )
    changes = {
        "steps": STEPS,
        "batch_size": ROWS,
        "minimality": MinimalityConfig(p=1.0),
    }
    with MaskedModel(vpd, model, fused_attention=True) as masked_model:
        trainer = Trainer(masked_model, CONFIG.model_copy(update={**changes, "coefficients": weights}), (ROWS, CONTEXT))
        for i in range(STEPS):
            trainer.step(tokens[i * ROWS : (i + 1) * ROWS, :CONTEXT])
    return vpd


def measured(vpd: Decomposition, model: Any) -> Evaluation:
    rows = bundled.tokens("validation")[:32, :64]
    config = EvaluationConfig(budgets=(20,), control_budgets=(), measures=("union_test", "cancelling"))
    return evaluate(vpd, model, rows, config)


def test_what_chance_does_not_show_an_attack_does(model: Any):
    shipped, alone, attacked = (
        measured(vpd, model)
        for vpd in (bundled.decomposition(), *(trained_on(model, adversarial=a) for a in (0.0, 0.5)))
    )
    assert [check.check for check in checks(shipped) if check.fault] == []
    assert [check.check for check in checks(alone) if check.fault] == ["adversary"]
    # By plain measures little is lost, and it needs fewer subcomponents; under attack it is far worse than its control.
    assert (
        alone.record["kl"]["stochastic"] < 0.1 * alone.record["kl"]["zero"]
        and alone.record["l0"] < shipped.record["l0"]
    )
    assert alone.record["pgd_kl"]["20"] > 2 * attacked.record["pgd_kl"]["20"] > 2 * alone.record["kl"]["stochastic"]
