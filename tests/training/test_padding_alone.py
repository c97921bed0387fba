"""Rows, micro-batches and batches of padding alone do not change a step, and do not stop it."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.tiny import GAMMA, decomposition_of, some_tokens, tiny_model
from tl_vpd import ExecutionConfig, VPDConfig
from tl_vpd.forward import MaskedModel
from tl_vpd.training import Trainer
from tl_vpd.training.engine.recording import RECORDED

RECIPES = {"the paper's": {}, "merged": {"merged": 0.5}, "squared error": {"output": "mse"}}
EXECUTIONS = {
    "whole": {},
    "micro-batches": {"micro_batch": 2},
    "micro-batches, blocked logits": {"micro_batch": 2, "blocked_logits": True},
    "micro-batches, recorded": {"micro_batch": 2, "compile": RECORDED},
}


def steps(tokens, token_mask, execution, **recipe):
    """Two steps in float64: metrics, parameters and sources."""
    model = tiny_model()
    config = VPDConfig(steps=10, batch_size=len(tokens), C=5, gamma=GAMMA, sites=("*W_Q", "*W_out"), **recipe)
    vpd = decomposition_of(model, C=5, sites=config.sites).double()
    with MaskedModel(vpd, model) as masked_model:
        trainer = Trainer(masked_model, config, tuple(tokens.shape), execution=ExecutionConfig(**execution))
        metrics = [trainer.step(tokens, token_mask) for _ in range(2)]
    return metrics, dict(vpd.named_parameters()), trainer.sources.values


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", EXECUTIONS)
def test_rows_of_padding_alone_change_nothing(name, recipe):
    execution, recipe = EXECUTIONS[name], RECIPES[recipe]
    if execution.get("blocked_logits") and recipe.get("output"):
        execution = {"micro_batch": 2}  # squared errors have no logits
    tokens, token_mask = some_tokens(shape=(4, 6)), torch.ones(4, 6, dtype=torch.bool)
    token_mask[1, :2] = token_mask[2:] = False
    metrics, weights, sources = steps(tokens, token_mask, execution, **recipe)
    fewer, weights_of_fewer, sources_of_fewer = steps(tokens[:2], token_mask[:2], {}, **recipe)
    for a, b in zip(metrics, fewer, strict=True):
        for field in ("total", "stochastic", "adversarial", "importance", "frequency", "faithfulness", "l0"):
            assert getattr(a, field) == pytest.approx(getattr(b, field), rel=1e-9), field
    for key, value in weights.items():
        assert_close(value.detach(), weights_of_fewer[key].detach(), rtol=1e-7, atol=1e-9, msg=key)
    assert_close(sources[: len(sources_of_fewer)], sources_of_fewer, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("execution", [{}, {"compile": RECORDED}], ids=["eager", "recorded"])
def test_a_batch_of_padding_alone_is_refused(execution):
    with pytest.raises(ValueError, match="every token of the batch is padding: leave out rows that are empty"):
        steps(some_tokens(shape=(2, 6)), torch.zeros(2, 6, dtype=torch.bool), execution)
