"""The penalty φ on an importance, which both minimality losses sum over tokens.

    φ(g) = (g + ε)^p                  ``power``: VPD paper, section "Optimizing for minimality"; p falls over the run
    φ(g) = g² / (g² + γ²)             ``smooth_l0``: the authors' later code; γ falls over the run
    φ(g) = (1 + γ²) g² / (g² + γ²)    ``smooth_l0``, normalised: φ(1) = 1 whatever γ
    s_c = Σ_n φ(g_upper)              over the real tokens n of the batch

g_upper is the upper-leaky squashing of Γ's pre-sigmoid values z (``tl_vpd.importance.squash``), which still has a slope above 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_vpd.checks import choice, integer
from tl_vpd.importance.squash import LEAK, LOWER_LEAKY, Squash

EPS = 1e-12
_BLOCK = 1 << 17


@dataclass(frozen=True)
class Penalty:
    """φ and its gradients.

    Attributes:
        kind: ``power`` or ``smooth_l0``.
        parameter: the exponent p, or the width γ.
        block: how many importances are processed at once; few enough to stay in the processor's cache.
        normalised: whether ``smooth_l0`` is divided by its value at 1.

    Raises:
        ValueError: there is no such kind, the block is empty, or ``power`` is normalised.
    """

    kind: Literal["power", "smooth_l0"]
    parameter: float | Float[Tensor, ""]
    block: int = _BLOCK
    normalised: bool = False

    def __post_init__(self) -> None:
        choice("kind", self.kind, ("power", "smooth_l0"))
        integer("block", self.block, minimum=1)
        if self.normalised and self.kind == "power":
            raise ValueError("normalised=True goes with kind='smooth_l0': (g + ε)^p is 1 at g = 1.")

    def value(self, g: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """φ(g); g is overwritten."""
        if self.kind == "power":
            return g.add_(EPS).pow_(self.parameter)
        squared = g.square_()
        values = squared.div_(squared + self.parameter**2)
        return values.mul_(1 + self.parameter**2) if self.normalised else values

    def slope(self, g: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """φ'(g); g is overwritten."""
        if self.kind == "power":
            return g.add_(EPS).pow_(self.parameter - 1).mul_(self.parameter)
        scale = 2 * self.parameter**2 * (1 + self.parameter**2 if self.normalised else 1)
        return g.mul(scale).div_(g.square_().add_(self.parameter**2).square_())

    @torch.no_grad()
    def sums(
        self, z: Float[Tensor, "tokens C_total"], token_mask: Bool[Tensor, " tokens"] | None = None
    ) -> Float[Tensor, " C_total"]:
        """``s_c`` of pre-sigmoid values z, without padding; no intermediate tensor of z's size is made."""
        total = z.new_zeros(z.shape[-1])
        for rows, real in self._blocks(z, token_mask):
            penalties = self.value(_upper_leaky(z[rows]))
            total += (penalties if real is None else penalties.mul_(real.unsqueeze(-1))).sum(0)
        return total

    @torch.no_grad()
    def pullback(
        self,
        z: Float[Tensor, "tokens C_total"],
        grad_sums: Float[Tensor, " C_total"],
        token_mask: Bool[Tensor, " tokens"] | None = None,
        *,
        grad_g: Float[Tensor, "tokens C_total"],
        squash: Squash = LOWER_LEAKY,
    ) -> Float[Tensor, "tokens C_total"]:
        """The gradient in z, from that in ``s_c`` and, through ``squash``, that in the importances g.

        Args:
            z: pre-sigmoid values.
            grad_sums: gradient in ``s_c``.
            token_mask: False at padding, which is not counted (None: no padding).
            grad_g: gradient in the importances that make masks; overwritten with the result.
            squash: makes those importances from z.
        """
        for rows, real in self._blocks(z, token_mask):
            values = z[rows]
            grad_upper = self.slope(_upper_leaky(values)).mul_(grad_sums)
            torch.where(values > 1, grad_upper * LEAK, grad_upper, out=grad_upper).masked_fill_(values < 0, 0)
            if real is not None:
                grad_upper.mul_(real.unsqueeze(-1))
            squash.pullback(values, grad_g[rows], grad_g[rows]).add_(grad_upper)
        return grad_g

    def _blocks(self, z: Tensor, token_mask: Tensor | None) -> Iterator[tuple[slice, Tensor | None]]:
        n = max(1, self.block // max(1, z.shape[-1]))
        for start in range(0, len(z), n):
            rows = slice(start, start + n)
            yield rows, None if token_mask is None else token_mask[rows]


def _upper_leaky(z: Tensor) -> Tensor:
    """``upper_leaky`` without gradients, in fewer operations."""
    return z.clamp(0, 1).lerp_(z.clamp(min=0), LEAK)
