"""Which engine a run has: eager, or compiled by a backend."""

from __future__ import annotations

import torch

from tl_vpd.adapters import Unsupported
from tl_vpd.checks import choice
from tl_vpd.forward.masked_model import MaskedModel
from tl_vpd.training.config import ExecutionConfig, VPDConfig
from tl_vpd.training.engine.compiled import CompiledEngine
from tl_vpd.training.engine.eager import EagerEngine


def engine_of(masked_model: MaskedModel, config: VPDConfig, execution: ExecutionConfig) -> EagerEngine:
    """The engine of a run.

    Args:
        masked_model: entered.
        config: what is learned.
        execution: how it runs.

    Raises:
        ValueError: V, U and Γ are in less than float32, or there is no such backend.
        Unsupported: the model is in float16, or does not go with ``execution``.
    """
    if masked_model.adapter.dtype == torch.float16:
        raise Unsupported(
            "The target is in torch.float16, in which gradients of a mean over a batch's tokens are rounded to 0: train on "
            "model.to(torch.float32) or torch.bfloat16; what is trained there fits the model in float16 too."
        )
    dtype = next(masked_model.weights.weights.parameters()).dtype
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"V, U and Γ are in {dtype}, in which small updates are lost: train with decomposition.float()."
        )
    passes = masked_model, config.output, config.squash
    options = execution.model_dump(include={"precision", "blocked_logits"})
    if not execution.compile:
        return EagerEngine(*passes, **options, checkpoint=execution.checkpoint)
    backend = "inductor" if execution.compile is True else execution.compile
    choice("compile", backend, ("recorded", *torch._dynamo.list_backends(None)))
    return CompiledEngine(*passes, **options, backend=backend)
