"""Training steps on any device, by recipe: what they measured, and what they left."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from tests.tiny import GAMMA, some_tokens, tiny_model
from tl_vpd import ExecutionConfig, TargetedConfig, VPDConfig
from tl_vpd.forward import MaskedModel
from tl_vpd.training import Trainer, new_decomposition
from tl_vpd.training.engine import compiled
from tl_vpd.training.targeted.trainer import TargetedTrainer

NEWER: dict[str, Any] = {
    "merged": 0.5,
    "minimality": {"kind": "smooth_l0", "frequency_reference": 64.0, "frequency_half_life": 5.0},
    "faithfulness": {"kind": "relative"},
    "adversary": {"pool": 4},
    "coefficients": {"delta": 1e3},
}
RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "the paper's": ({}, {}),
    "micro-batches": ({}, {"micro_batch": 2}),
    "newer": (NEWER, {}),
    "newer in micro-batches": (NEWER, {"micro_batch": 2}),
    "both kinds of rows routed": ({"merged": 0.75, "adversary": {"routing": "uniform_k"}}, {}),
    "layerwise and locality": ({"coefficients": {"layerwise": 0.5, "locality": 0.1}}, {}),
    "Muon": ({"optimizer": {"kind": "muon", "lr": 1e-3}}, {}),
    "a layer's activations again": ({}, {"checkpoint": True}),
    "logits in blocks": ({}, {"blocked_logits": True}),
    "from the first decomposed block": ({"sites": ("blocks.1.*",)}, {}),
    "a causal Γ on residual streams": ({"gamma": {**GAMMA, "causal": True, "reads": "residual"}}, {}),
    "the functions of graphs": ({}, {"compile": "recorded"}),
    "the functions of graphs, newer": (NEWER, {"compile": "recorded"}),
    "targeted": ({}, {}),
}
"""Settings of the config, and of ``ExecutionConfig``."""
SHAPE, OTHER = (4, 7), (3, 9)
STEPS = 2


def padding(shape: tuple[int, int], device: str) -> Tensor:
    """False at the ends of two rows."""
    mask = torch.ones(*shape, dtype=torch.bool)
    mask[1, 4:] = mask[2, 2:] = False
    return mask.to(device)


def steps(
    name: str, device: str, *, padded: bool, watch: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> tuple[dict[str, float], list[Tensor], Any]:
    """Steps of a recipe.

    Args:
        name: of the recipe.
        device: where.
        padded: whether rows have padding.
        watch: around each step.

    Returns:
        The last step's metrics, V, U, Γ and the sources on the CPU, and what the last ``watch`` gave.
    """
    settings, execution = RECIPES[name]
    model, targeted = tiny_model(torch.float32).to(torch.device(device)), name == "targeted"
    common: dict[str, Any] = {"steps": 10, "C": 6, "batch_size": 4, "gamma": GAMMA, **settings}
    config = TargetedConfig(**common, nontarget_batch_size=3) if targeted else VPDConfig(**common)
    shapes = (SHAPE, OTHER) if targeted else (SHAPE,)
    batch: list[Any] = []
    for i, shape in enumerate(shapes):
        batch += [some_tokens(i, shape).to(device), padding(shape, device) if padded else None]
    vpd = new_decomposition(model, config)
    with MaskedModel(vpd, model, fused_attention=True) as masked_model, patch.object(compiled, "compiled", as_it_is):
        how = ExecutionConfig(**execution)
        trainer: Any = (
            TargetedTrainer(masked_model, config, shapes, execution=how)  # type: ignore[arg-type]
            if isinstance(config, TargetedConfig)
            else Trainer(masked_model, config, SHAPE, execution=how)
        )
        for _ in range(STEPS):
            with watch() as seen:
                metrics = trainer.step(*batch)
    left = [*vpd.parameters(), trainer.sources.values]
    return vars(metrics), [tensor.detach().cpu() for tensor in left], seen


def as_it_is(function: Any, arguments: Any, *_: Any, **__: Any) -> Any:
    """In the place of ``compiled``: the function of a graph, which runs as it is; the accelerator cannot be recorded."""

    def filled(*tensors: Tensor) -> Any:
        rest = iter(tensors)
        return function(*(None if a is None else next(rest) for a in arguments))

    return filled
