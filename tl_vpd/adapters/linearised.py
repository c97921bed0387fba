"""A forward pass with norms' scales and attention patterns as constants, so that the rest of it is linear.

A norm at a fixed scale is ``w ⊙ (x − x̄) / s + b`` with s a constant, an attention layer at a fixed pattern ``Σ pattern · v``.
Values do not change (a bridge's norms change by rounding only); gradients no longer pass through s and the pattern.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

SeeNorm = Callable[[Tensor, Tensor | None], None]
"""Is called with a norm's output and its bias (None: it has none)."""


def norm_modules(modules: Iterator[nn.Module]) -> list[nn.Module]:
    """The norms of a model of TransformerLens: what has a HookPoint for its scale."""
    return [module for module in modules if isinstance(module._modules.get("hook_scale"), nn.Module)]


def pattern_points(modules: Iterator[nn.Module]) -> list[nn.Module]:
    """The HookPoints that attention patterns pass."""
    points = (module._modules.get("hook_pattern") for module in modules)
    return list({id(point): point for point in points if isinstance(point, nn.Module)}.values())


def constant(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
    """A forward hook that cuts gradients."""
    return output.detach()


def at_fixed_scale(
    x: Float[Tensor, "*batch d"],
    y: Float[Tensor, "*batch d"],
    weight: Float[Tensor, " d"] | None,
    bias: Float[Tensor, " d"] | None,
    *,
    centred: bool,
) -> Float[Tensor, "*batch d"]:
    """A norm's output y as a linear function of its input: ``w ⊙ (x − x̄) / s + b``, with 1/s read off y."""
    linear = x - x.mean(-1, keepdim=True) if centred else x
    linear = linear if weight is None else linear * weight
    with torch.no_grad():
        # Squares of half-precision streams overflow in half precision.
        exact = torch.promote_types(y.dtype, torch.float32)
        scaled, unscaled = (y if bias is None else y - bias).to(exact), linear.to(exact)
        inverse = (scaled * unscaled).sum(-1, keepdim=True) / unscaled.square().sum(-1, keepdim=True).clamp_min(1e-30)
    output = linear * inverse.to(linear.dtype)
    return output if bias is None else output + bias
