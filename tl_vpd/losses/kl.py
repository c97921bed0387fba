"""KL divergence of the masked model's next-token distribution q from the target's p, in nats.

    KL(p ‖ q) = Σ_v p_v (log p_v − log q_v)            averaged over real positions

This is the distance D of the reconstruction losses (VPD paper, section "Optimizing for mechanistic faithfulness"). It is computed
in float32, or in float64 where the logits are. Without any real position it is 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from tl_vpd.losses.precision import at_least_float32

_BLOCK = 1 << 17
"""Logits processed at once: few enough to stay in the processor's cache."""


class _SummedKL(torch.autograd.Function):
    """``Σ_n w_n KL(p_n ‖ q_n)`` over rows of logits, block by block: no second tensor of the logits' size is made.

    ∂/∂logits = w (softmax(logits) − p), since p sums to 1.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, log_p: Tensor, weights: Tensor | None) -> Tensor:
        ctx.save_for_backward(logits, log_p, weights)
        total = torch.zeros((), dtype=log_p.dtype, device=logits.device)
        for rows in row_blocks(len(logits), logits.shape[-1], _BLOCK):
            terms = log_p[rows] - at_least_float32(logits[rows]).log_softmax(-1)
            kl = torch.linalg.vecdot(log_p[rows].exp(), terms)
            total += (kl if weights is None else kl * weights[rows]).sum()
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        logits, log_p, weights = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        for rows in row_blocks(len(logits), logits.shape[-1], _BLOCK):
            q = at_least_float32(logits[rows]).softmax(-1)
            q.sub_(log_p[rows].exp()).mul_(grad)
            grad_logits[rows] = q if weights is None else q.mul_(weights[rows, None])
        return grad_logits, None, None


def row_blocks(rows: int, width: int, entries: int) -> Iterator[slice]:
    """Consecutive blocks of rows with at most ``entries`` entries each, but at least one row."""
    n = max(1, entries // width)
    for start in range(0, rows, n):
        yield slice(start, start + n)


def kl_divergence(
    target_log_probs: Float[Tensor, "batch pos vocab"],
    logits: Float[Tensor, "batch pos vocab"],
    token_mask: Bool[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, ""]:
    """Mean KL divergence of the masked model's output from the target's, in nats.

    Args:
        target_log_probs: log p; a constant: no gradients reach it.
        logits: of the masked model; q is their softmax.
        token_mask: False at padding, which the mean leaves out (None: no padding).
    """
    log_p, rows = at_least_float32(target_log_probs.flatten(0, -2)), logits.flatten(0, -2)
    if token_mask is None:
        return _SummedKL.apply(rows, log_p, None) / max(len(rows), 1)
    return _SummedKL.apply(rows, log_p, token_mask.flatten().to(log_p.dtype)) / token_mask.sum().clamp(min=1)
