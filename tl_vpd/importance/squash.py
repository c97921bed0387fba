"""From pre-sigmoid values z to causal importances g in [0, 1]: two leaky hard sigmoids.

*Lower-leaky* (makes masks): forward ``clamp(z, 0, 1)``. Its gradient passes on (0, 1]; above 1 it is 0; at ``z ≤ 0`` a
hundredth passes, and only where descent would raise z, so that a subcomponent that is off can come back and nothing
pushes it further down (VPD paper, section on the causal-importance function).

*Upper-leaky* (feeds the minimality losses): ``clamp(z, 0, 1)`` up to 1 and slope 0.01 above, so that values beyond 1 are
still pulled back.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

LEAK = 0.01


class _LowerLeaky(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (z,) = ctx.saved_tensors
        return lower_leaky_pullback(z, grad)


def lower_leaky_pullback(
    z: Float[Tensor, "*batch"], grad: Float[Tensor, "*batch"], out: Float[Tensor, "*batch"] | None = None
) -> Float[Tensor, "*batch"]:
    """The gradient in z from the gradient in g (``out`` may be ``grad``)."""
    leaked = grad.clamp(max=0).mul_(LEAK)
    out = torch.where(z > 0, grad, leaked) if out is None else torch.where(z > 0, grad, leaked, out=out)
    return out.masked_fill_(z > 1, 0)


class Squash:
    """The lower-leaky squashing as training's passes use it: values without autograd, and the gradient written out.

    Baselines with another squashing override both methods.
    """

    def importances(self, z: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """Importances for masks, as constants."""
        return z.clamp(0, 1)

    def pullback(
        self, z: Float[Tensor, "*batch"], grad: Float[Tensor, "*batch"], out: Float[Tensor, "*batch"] | None = None
    ) -> Float[Tensor, "*batch"]:
        """The gradient in z from the gradient in g (``out`` may be ``grad``)."""
        return lower_leaky_pullback(z, grad, out)


LOWER_LEAKY = Squash()
"""The paper's."""


def lower_leaky(z: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Importances for masks.

    The rule at ``z ≤ 0`` looks at the sign of the summed incoming gradient: squash once and share the result between
    losses, or gradients of separate losses will not add up.
    """
    return _LowerLeaky.apply(z)


def upper_leaky(z: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Importances for the minimality losses."""
    return torch.where(z > 1, 1 + LEAK * (z - 1), z.clamp(0, 1))
