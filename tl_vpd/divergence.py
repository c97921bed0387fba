"""How far one output is from another: KL divergence of next-token distributions, or the squared error, in float32.

KL(target ‖ masked) = Σ_v p_v (log p_v − log q_v)       per position, then averaged over real positions, in nats
MSE(target, masked) = mean_d (t_d − y_d)²               for models whose output is no distribution
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK = 1 << 17
"""Logits handled at once: few enough to stay in the processor's cache."""


class _KL(torch.autograd.Function):
    """``Σ_n w_n KL(p_n ‖ q_n)`` over rows of logits, some rows at once: no second tensor of the logits' size is kept.

    ∂/∂logits = w (softmax(logits) − p), since p sums to 1.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, weights: Tensor | None) -> Tensor:
        ctx.save_for_backward(logits, target, weights)
        total = torch.zeros((), device=logits.device)
        for rows in _rows(logits):
            log_p = target[rows]
            terms = log_p - logits[rows].float().log_softmax(-1)
            if weights is None:
                total += torch.linalg.vecdot(log_p.exp(), terms).sum()
            else:
                total += (torch.linalg.vecdot(log_p.exp(), terms) * weights[rows]).sum()
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        logits, target, weights = ctx.saved_tensors
        out = torch.empty_like(logits)
        for rows in _rows(logits):
            q = logits[rows].float().softmax(-1)
            q.sub_(target[rows].exp()).mul_(grad)
            out[rows] = q if weights is None else q.mul_(weights[rows, None])
        return out, None, None


def _rows(logits: Tensor) -> list[slice]:
    rows = max(1, _BLOCK // logits.shape[-1])
    return [slice(start, start + rows) for start in range(0, len(logits), rows)]


def kl_divergence(
    target_log_probs: Float[Tensor, "batch pos vocab"],
    logits: Float[Tensor, "batch pos vocab"],
    keep: Bool[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, ""]:
    """Mean KL(target ‖ masked) over positions where ``keep`` is True (None: all); no gradients reach the target."""
    rows, target = logits.flatten(0, -2), target_log_probs.flatten(0, -2)
    if keep is None:
        return _KL.apply(rows, target, None) / len(rows)
    return _KL.apply(rows, target, keep.flatten().float()) / keep.sum()


def squared_error(
    target: Float[Tensor, "*batch d"], output: Float[Tensor, "*batch d"], keep: Bool[Tensor, "*batch"] | None = None
) -> Float[Tensor, ""]:
    """Mean squared error over entries where ``keep`` is True (None: all)."""
    error = (output.float() - target.float()).square().mean(-1)
    return error.mean() if keep is None else error[keep].mean()


def next_token_ce(
    logits: Float[Tensor, "batch pos vocab"],
    tokens: Int[Tensor, "batch pos"],
    keep: Bool[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, ""]:
    """Mean cross-entropy of the next token in nats, over pairs of real tokens."""
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
    if keep is None:
        return losses.mean()
    return losses[(keep[:, :-1] & keep[:, 1:]).flatten()].mean()
