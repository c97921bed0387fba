"""From pre-sigmoid values z to causal importances g in [0, 1]: two leaky hard sigmoids.

*Lower-leaky* (makes masks): forward ``clamp(z, 0, 1)``. Its gradient passes on (0, 1]; above 1 it is 0; at ``z ≤ 0`` a
hundredth passes, and only where descent would raise z, so that a subcomponent switched off can come back and nothing
pushes it further down.

*Upper-leaky* (feeds the minimality losses): ``clamp(z, 0, 1)`` up to 1 and slope 0.01 above, so that values beyond 1 are
still drawn back.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

LEAK = 0.01
_BLOCK = 1 << 18


class _LowerLeaky(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (z,) = ctx.saved_tensors
        # Blocks small enough for the processor's cache: no temporary of z's size.
        out = z.new_empty(z.shape)
        for own, incoming, target in zip(*(t.reshape(-1).split(_BLOCK) for t in (z, grad, out)), strict=True):
            lower_leaky_pullback(own, incoming, out=target)
        return out


def lower_leaky_pullback(
    z: Float[Tensor, "*batch"],
    grad: Float[Tensor, "*batch"],
    out: Float[Tensor, "*batch"] | None = None,
    *,
    forward_slope: float = 0.0,
) -> Float[Tensor, "*batch"]:
    """The gradient in z from the gradient in g (``out`` may be ``grad``).

    With a ``forward_slope``, g went on below 0 with that slope, as in SPD, and the gradient passes there whatever its sign.
    """
    leaked = grad * forward_slope if forward_slope else grad.clamp(max=0).mul_(LEAK)
    out = torch.where(z > 0, grad, leaked) if out is None else torch.where(z > 0, grad, leaked, out=out)
    return out.masked_fill_(z > 1, 0)


def importances_of(z: Float[Tensor, "*batch"], forward_slope: float = 0.0) -> Float[Tensor, "*batch"]:
    """Importances for masks as constants: ``clamp(z, 0, 1)``, which goes on below 0 with a ``forward_slope``."""
    g = z.clamp(0, 1)
    return g.add_(z.clamp(max=0), alpha=forward_slope) if forward_slope else g


def lower_leaky(z: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Importances for masks.

    The rule at ``z ≤ 0`` looks at the sign of the summed incoming gradient: squash once and share the result between
    losses, or gradients of separate losses will not add up.
    """
    return _LowerLeaky.apply(z)


def upper_leaky(z: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Importances for the minimality losses."""
    return torch.where(z > 1, 1 + LEAK * (z - 1), z.clamp(0, 1))
