"""Few subcomponents should matter at a token, and each at few tokens.

With ``s_c = Σ_n φ(g_upper)`` summed over the ``N`` real tokens of the batch, and the frequency ``f_c = s_c / N``,

    importance minimality   L_imp  = Σ_c f_c
    frequency minimality    L_freq = Σ_c Φ(f_c),      Φ(f) = f · log2(1 + a f)

    φ(g) = (g + ε)^p                  the paper's; p falls over the run
    φ(g) = g² / (g² + γ²)             smooth L0, the newer recipe's; γ falls over the run

The logarithm charges a subcomponent more for each token the more tokens it is already used at, so that one mechanism is
not spread over several subcomponents. ``a = N`` is the paper's term; a fixed *reference count* a makes the loss independent
of the batch size. At a debiased running mean ``f̂`` of the frequency (``RunningFrequency``) its value is ``Φ(f̂)`` and its
gradient ``Φ'(f̂) · ∂f``.
"""

from __future__ import annotations

import math
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
            steep = upper_leaky(block).add_(EPS).pow_(ctx.p - 1).mul_(scaled)
            torch.mul(steep, slope_of_upper_leaky(block), out=target)
        return out, None


class _SmoothSums(torch.autograd.Function):
    """``Σ_n g² / (g² + γ²)`` with ``g = upper_leaky(z)``, block by block."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, gamma: float) -> Tensor:
        ctx.save_for_backward(z)
        ctx.gamma = gamma
        total = z.new_zeros(z.shape[-1])
        for block in z.split(_ROWS):
            squared = upper_leaky(block).square_()
            total += (squared / (squared + gamma**2)).sum(0)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (z,) = ctx.saved_tensors
        out = torch.empty_like(z)
        scaled = grad * (2 * ctx.gamma**2)
        for block, target in zip(z.split(_ROWS), out.split(_ROWS), strict=True):
            g = upper_leaky(block)
            torch.mul(g * scaled, slope_of_upper_leaky(block), out=target).div_(g.square().add_(ctx.gamma**2).square_())
        return out, None


def slope_of_upper_leaky(z: Tensor) -> Tensor:
    """The derivative of ``upper_leaky``: 1 on [0, 1], the leak above, 0 below."""
    return torch.where(z > 1, LEAK, ((z >= 0) & (z <= 1)).to(z.dtype))


def power_sums(
    z: Float[Tensor, "batch *pos C_total"], p: float, keep: Bool[Tensor, "batch pos"] | None = None
) -> tuple[Float[Tensor, " C_total"], int]:
    """``s_c`` with ``φ = (g + ε)^p`` from pre-sigmoid values, and the number of real tokens."""
    real = z.flatten(0, -2) if keep is None else z[keep]
    return _PowerSums.apply(real, p), len(real)


def smooth_sums(
    z: Float[Tensor, "batch *pos C_total"], gamma: float, keep: Bool[Tensor, "batch pos"] | None = None
) -> tuple[Float[Tensor, " C_total"], int]:
    """``s_c`` with ``φ = g² / (g² + γ²)`` from pre-sigmoid values, and the number of real tokens."""
    real = z.flatten(0, -2) if keep is None else z[keep]
    return _SmoothSums.apply(real, gamma), len(real)


def importance_minimality(s: Float[Tensor, " C_total"], n: int) -> Float[Tensor, ""]:
    """Mean over tokens, sum over subcomponents."""
    return s.sum() / n


def frequency_minimality(
    s: Float[Tensor, " C_total"],
    n: int,
    *,
    reference: float | None = None,
    at: Float[Tensor, " C_total"] | None = None,
) -> Float[Tensor, ""]:
    """``Σ_c Φ(f_c)``.

    Args:
        reference: the count a (None: the number of tokens, the paper's term).
        at: the running mean ``f̂`` at which Φ and its slope are taken (None: the batch's own frequency).
    """
    a = float(n) if reference is None else reference
    f = s / n
    if at is None:
        return (f * (1 + a * f).log2()).sum()
    here = at.detach()
    slope = (1 + a * here).log2() + a * here / ((1 + a * here) * math.log(2))
    value = (here * (1 + a * here).log2()).sum()
    return value + (slope * (f - f.detach())).sum()


class RunningFrequency:
    """A debiased running mean of the frequencies: ``f̂ ← β f̂ + (1 − β) f``, divided by ``1 − β^t``; β from a half-life."""

    def __init__(self, width: int, half_life: float, *, device: torch.device | None = None) -> None:
        self.beta = 0.5 ** (1 / half_life)
        self.mean = torch.zeros(width, device=device)
        self.updates = 0

    @torch.no_grad()
    def update(self, f: Float[Tensor, " C_total"]) -> Float[Tensor, " C_total"]:
        """Takes a batch's frequencies in and gives the debiased mean."""
        self.updates += 1
        self.mean.lerp_(f.to(self.mean), 1 - self.beta)
        return self.mean / (1 - self.beta**self.updates)
