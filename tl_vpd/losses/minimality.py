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
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_vpd.importance.squash import LEAK, lower_leaky_pullback

EPS = 1e-12
_BLOCK = 1 << 16
"""Elements handled at once: few enough to stay in the processor's cache."""


@dataclass(frozen=True)
class Penalty:
    """How much an importance counts, φ: ``power`` with the exponent p, or ``smooth_l0`` with the width γ, as ``parameter``.

    ``block``: how many importances are handled at once.
    """

    kind: Literal["power", "smooth_l0"]
    parameter: float | Float[Tensor, ""]
    block: int = _BLOCK

    def value(self, g: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """φ(g); g is used up."""
        if self.kind == "power":
            return g.add_(EPS).pow_(self.parameter)
        squared = g.square_()
        return squared.div_(squared + self.parameter**2)

    def slope(self, g: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """φ'(g); g is used up."""
        if self.kind == "power":
            return g.add_(EPS).pow_(self.parameter - 1).mul_(self.parameter)
        return g.mul(2 * self.parameter**2).div_(g.square_().add_(self.parameter**2).square_())

    @torch.no_grad()
    def sums(
        self, z: Float[Tensor, "tokens C_total"], token_mask: Bool[Tensor, " tokens"] | None = None
    ) -> Float[Tensor, " C_total"]:
        """``s_c`` from pre-sigmoid values; no intermediate of z's size is made."""
        total = z.new_zeros(z.shape[-1])
        for block, kept in self._blocks(z, token_mask):
            counted = self.value(_upper_leaky(z[block]))
            total += (counted if kept is None else counted.mul_(kept.unsqueeze(-1))).sum(0)
        return total

    @torch.no_grad()
    def pullback(
        self,
        z: Float[Tensor, "tokens C_total"],
        of_sums: Float[Tensor, " C_total"],
        token_mask: Bool[Tensor, " tokens"] | None = None,
        *,
        of_g: Float[Tensor, "tokens C_total"] | None = None,
        forward_slope: float = 0.0,
    ) -> Float[Tensor, "tokens C_total"]:
        """The gradient in z from that in ``s_c`` and, through the lower-leaky squashing, that in the importances g.

        ``of_g`` is written over with the result. ``forward_slope``: of the lower-leaky squashing below 0.
        """
        out = torch.empty_like(z) if of_g is None else of_g
        for block, kept in self._blocks(z, token_mask):
            own = z[block]
            steep = self.slope(_upper_leaky(own)).mul_(of_sums)
            torch.where(own > 1, steep * LEAK, steep, out=steep).masked_fill_(own < 0, 0)
            if kept is not None:
                steep.mul_(kept.unsqueeze(-1))
            if of_g is None:
                out[block] = steep
            else:
                lower_leaky_pullback(own, out[block], out=out[block], forward_slope=forward_slope).add_(steep)
        return out

    def _blocks(self, z: Tensor, token_mask: Tensor | None) -> Iterator[tuple[slice, Tensor | None]]:
        rows = max(1, self.block // max(1, z.shape[-1]))
        for start in range(0, len(z), rows):
            block = slice(start, start + rows)
            yield block, None if token_mask is None else token_mask[block]


class _Sums(torch.autograd.Function):
    """``Penalty.sums``, of which only z is kept for backward."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, penalty: Penalty, token_mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(z, token_mask)
        ctx.penalty = penalty
        return penalty.sums(z, token_mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        z, token_mask = ctx.saved_tensors
        return ctx.penalty.pullback(z, grad, token_mask), None, None


def _upper_leaky(z: Tensor) -> Tensor:
    """``upper_leaky`` without gradients, in fewer operations."""
    return z.clamp(0, 1).add_((z - 1).clamp_(min=0), alpha=LEAK)


def penalty_sums(
    z: Float[Tensor, "batch *pos C_total"], penalty: Penalty, token_mask: Bool[Tensor, "batch pos"] | None = None
) -> tuple[Float[Tensor, " C_total"], int]:
    """``s_c`` from pre-sigmoid values, and the number of real tokens."""
    rows, kept = z.flatten(0, -2), None if token_mask is None else token_mask.flatten()
    return _Sums.apply(rows, penalty, kept), len(rows) if kept is None else int(kept.sum())


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
