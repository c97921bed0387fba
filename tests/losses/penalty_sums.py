"""The sums of a penalty as a differentiable function of Γ's values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tl_vpd.losses import Penalty


class Sums(torch.autograd.Function):
    """``Penalty.sums``, with ``Penalty.pullback`` as its gradient."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, penalty: Penalty, token_mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(z, token_mask)
        ctx.penalty = penalty
        return penalty.sums(z, token_mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        z, token_mask = ctx.saved_tensors
        return ctx.penalty.pullback(z, grad, token_mask, grad_g=torch.zeros_like(z)), None, None


def penalty_sums(z: Tensor, penalty: Penalty, token_mask: Tensor | None = None) -> tuple[Tensor, int]:
    """The sums over real tokens, and their number."""
    rows, real = z.flatten(0, -2), None if token_mask is None else token_mask.flatten()
    return Sums.apply(rows, penalty, real), len(rows) if real is None else int(real.sum())
