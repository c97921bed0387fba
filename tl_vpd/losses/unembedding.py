"""The last product of a transformer, ``logits = x @ W_U + b_U``, and the KL divergence computed from x without whole logits.

Logits are the largest tensor of a small model with a large vocabulary. ``unembedded_kl`` computes them for a block of tokens at a
time, the target's as well, so that their memory does not grow with the number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from tl_vpd.losses.kl import row_blocks
from tl_vpd.losses.precision import at_least_float32

LOGITS_AT_ONCE = 1 << 24
"""Logits in one block (a quarter of it on a CPU): few next to all of them, many enough for a fast product."""


@dataclass(frozen=True)
class Unembedding:
    """``weight`` and ``bias`` of the product; both are constants."""

    weight: Float[Tensor, "vocab d_model"]
    bias: Float[Tensor, " vocab"] | None

    @property
    def vocabulary(self) -> int:
        """Number of logits per token."""
        return len(self.weight)

    def to(self, dtype: torch.dtype) -> Unembedding:
        """The same, for products in another dtype."""
        return Unembedding(self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))

    def logits(self, x: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows vocab"]:
        """Logits in float32 (float64 where the weight is), from the input of the unembedding."""
        return at_least_float32(F.linear(x.to(self.weight.dtype), self.weight, self.bias))


class _SummedUnembeddedKL(torch.autograd.Function):
    """``Σ_n w_n KL(p_n ‖ q_n)`` from the inputs of the unembedding, block by block; the gradient is computed in the same loop.

    For the logits ``z = x Wᵀ + b`` of the masked model:  ∂/∂x = w (softmax(z) − p) W.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, target: Tensor, unembedding: Unembedding, weights: Tensor | None) -> Tensor:
        kind = torch.promote_types(unembedding.weight.dtype, torch.float32)
        total, gradients = torch.zeros((), dtype=kind, device=x.device), []
        entries = LOGITS_AT_ONCE // 4 if x.device.type == "cpu" else LOGITS_AT_ONCE
        for rows in row_blocks(len(x), unembedding.vocabulary, entries):
            log_p = unembedding.logits(target[rows]).log_softmax(-1)
            log_q = unembedding.logits(x[rows]).log_softmax(-1)
            p = log_p.exp()
            kl = torch.linalg.vecdot(p, log_p.sub_(log_q))
            total = total + (kl if weights is None else kl * weights[rows]).sum()
            if ctx.needs_input_grad[0]:
                difference = log_q.exp_().sub_(p)
                difference = difference if weights is None else difference.mul_(weights[rows, None])
                gradients.append(difference.to(unembedding.weight.dtype) @ unembedding.weight)
        ctx.save_for_backward(torch.cat(gradients) if gradients else None)
        ctx.dtype = x.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return (gradient * grad).to(ctx.dtype), None, None, None


def unembedded_kl(
    target: Float[Tensor, "batch pos d_model"],
    output: Float[Tensor, "batch pos d_model"],
    unembedding: Unembedding,
    token_mask: Bool[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, ""]:
    """``kl_divergence`` of the logits that an unembedding makes of two outputs. Under ``no_grad`` no gradient is computed.

    Args:
        target: input of the unembedding in the target model; a constant.
        output: input of the unembedding in the masked model.
        unembedding: makes logits of both.
        token_mask: False at padding, which the mean leaves out (None: no padding).
    """
    kind = torch.promote_types(unembedding.weight.dtype, torch.float32)
    weights = None if token_mask is None else token_mask.flatten().to(kind)
    total = _SummedUnembeddedKL.apply(output.flatten(0, -2), target.flatten(0, -2), unembedding, weights)
    return total / (max(output[..., 0].numel(), 1) if weights is None else weights.sum().clamp(min=1))
