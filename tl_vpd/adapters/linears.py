"""Weights of modules that are a product: ``nn.Linear`` ``[out, in]`` and transformers' ``Conv1D`` ``[in, out]``."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D, which stores its weight as ``[in, out]``."""
    return type(module).__name__ == "Conv1D"


def why_not(module: nn.Module | None) -> str | None:
    """Why a module's weight cannot be decomposed (None: it can)."""
    if module is None:
        return "there is no such layer"
    if not (isinstance(module, nn.Linear) or is_conv1d(module)):
        return f"a {type(module).__name__}, which is not an nn.Linear"
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        return f"its weight is {kind}: load the model unquantised"
    return None


def oriented(module: nn.Module) -> Float[Tensor, "d_in d_out"]:
    """The module's weight as ``[d_in, d_out]`` (detached, a view)."""
    W: Tensor = module.weight.detach()  # type: ignore[operator, union-attr, assignment]
    return W if is_conv1d(module) else W.T


@torch.no_grad()
def overwrite(module: nn.Module, W: Float[Tensor, "d_in d_out"]) -> None:
    """Writes ``W`` into the module's weight, in place."""
    module.weight.copy_(W if is_conv1d(module) else W.T)  # type: ignore[operator, union-attr]
