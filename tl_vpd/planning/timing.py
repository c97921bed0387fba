"""The time of a training step on this machine: a few real steps on random tokens."""

from __future__ import annotations

import time

import torch
from torch import nn

from tl_vpd.adapters import adapt
from tl_vpd.checks import config_of, integer, number
from tl_vpd.forward.masked_model import MaskedModel
from tl_vpd.planning.target import Target
from tl_vpd.training.config import ExecutionConfig, VPDConfig
from tl_vpd.training.new_decomposition import new_decomposition
from tl_vpd.training.trainer import Trainer

STEPS = 4
"""Steps that are timed at most; the first one also fills caches and counts only where it is alone."""


def seconds_per_step(
    model: nn.Module,
    config: VPDConfig | None = None,
    *,
    context: int,
    execution: ExecutionConfig | None = None,
    limit: float = 60.0,
) -> float:
    """Seconds of a training step, without compilation: the median of a few.

    Args:
        model: the target; its weights, hooks and flags are afterwards as they were.
        config: of the run (None: ``VPDConfig()``).
        context: tokens in a row.
        execution: how it runs; ``compile`` is left off (None: ``ExecutionConfig()``).
        limit: seconds after which no further step begins.

    Raises:
        TypeError: an argument is of another type.
        ValueError: a number is out of its range.
    """
    context, limit = integer("context", context, minimum=1), number("limit", limit, minimum=0)
    config = config_of(VPDConfig, config)
    execution = config_of(ExecutionConfig, execution).model_copy(update={"compile": False})
    Target.of(model)  # refuses what has no tokens
    adapter = adapt(model)
    longest = int(getattr(model.cfg, "n_ctx", None) or context)  # type: ignore[union-attr, arg-type]
    if context > longest:
        raise ValueError(f"context={context}: this model takes at most {longest} tokens.")
    vocabulary = int(model.cfg.d_vocab)  # type: ignore[union-attr, arg-type]
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(vocabulary, (config.batch_size, context), generator=generator).to(adapter.device)
    seconds: list[float] = []
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(adapter.device.type, enabled=False),
        MaskedModel(new_decomposition(model, config), model, fused_attention=True) as masked_model,
    ):
        trainer = Trainer(masked_model, config, (config.batch_size, context), execution=execution)
        while len(seconds) < STEPS and (not seconds or sum(seconds) < limit):
            start = time.perf_counter()
            trainer.step(rows)  # reads its losses, and so waits for the device
            seconds.append(time.perf_counter() - start)
    timed = sorted(seconds[1:] or seconds)
    return timed[len(timed) // 2]
