"""Few subcomponents should matter at a token, and each at few tokens.

With ``s_c = Σ_n (g_upper + ε)^p`` summed over the ``N`` real tokens of the batch,

    importance minimality   L_imp  = Σ_c s_c / N
    frequency minimality    L_freq = Σ_c s_c / N · log2(1 + s_c)

The logarithm charges a subcomponent more for each token the more tokens it is already used at, so that one mechanism is
not spread over several subcomponents.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_vpd.importance.squash import LEAK, upper_leaky

EPS = 1e-12
_ROWS = 128
"""Tokens handled at once: few enough that a block of importances stays in the processor's cache."""


class _PowerSums(torch.autograd.Function):
    """``Σ_n (upper_leaky(z) + ε)^p`` block by block: only z is kept, and no intermediate of its size is ever made."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, p: float) -> Tensor:
        ctx.save_for_backward(z)
        ctx.p = p
        total = z.new_zeros(z.shape[-1])
        for block in z.split(_ROWS):
            total += upper_leaky(block).add_(EPS).pow_(p).sum(0)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (z,) = ctx.saved_tensors
        out = torch.empty_like(z)
        scaled = grad * ctx.p
        for block, target in zip(z.split(_ROWS), out.split(_ROWS), strict=True):
            slope = torch.where(block > 1, LEAK, ((block >= 0) & (block <= 1)).to(z.dtype))
            torch.mul(upper_leaky(block).add_(EPS).pow_(ctx.p - 1).mul_(scaled), slope, out=target)
        return out, None


def power_sums(
    z: Float[Tensor, "batch pos C_total"], p: float, keep: Bool[Tensor, "batch pos"] | None = None
) -> tuple[Float[Tensor, " C_total"], int]:
    """``s_c`` from pre-sigmoid values, and the number of real tokens."""
    real = z.flatten(0, 1) if keep is None else z[keep]
    return _PowerSums.apply(real, p), len(real)


def importance_minimality(s: Float[Tensor, " C_total"], n: int) -> Float[Tensor, ""]:
    """Mean over tokens, sum over subcomponents."""
    return s.sum() / n


def frequency_minimality(s: Float[Tensor, " C_total"], n: int) -> Float[Tensor, ""]:
    """Mean over tokens times the log of one plus the sum over them; summed over subcomponents."""
    return (s * (1 + s).log2()).sum() / n
