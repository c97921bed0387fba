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

from tl_vpd.losses.unembedding import Unembedding

_BLOCK = 1 << 17
"""Logits handled at once: few enough to stay in the processor's cache."""
MADE = 1 << 24
"""Logits made at once (a quarter of it on a CPU): few next to all of them, many enough for a fast product."""


class _KL(torch.autograd.Function):
    """``Σ_n w_n KL(p_n ‖ q_n)`` over rows of logits, some rows at once: no second tensor of the logits' size is kept.

    ∂/∂logits = w (softmax(logits) − p), since p sums to 1.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, weights: Tensor | None) -> Tensor:
        ctx.save_for_backward(logits, target, weights)
        total = torch.zeros((), device=logits.device)
        for rows in _rows(len(logits), logits.shape[-1], _BLOCK):
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
        for rows in _rows(len(logits), logits.shape[-1], _BLOCK):
            q = logits[rows].float().softmax(-1)
            q.sub_(target[rows].exp()).mul_(grad)
            out[rows] = q if weights is None else q.mul_(weights[rows, None])
        return out, None, None


class _UnembeddedKL(torch.autograd.Function):
    """``Σ_n w_n KL(p_n ‖ q_n)`` from what makes the logits, some rows at once, with the gradient made beside it.

    For the logits ``z = x Wᵀ + b`` of masked rows x:  ∂/∂x = w (softmax(z) − p) W.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, target: Tensor, unembedding: Unembedding, weights: Tensor | None) -> Tensor:
        total, gradients = torch.zeros((), device=x.device), []
        made = MADE // 4 if x.device.type == "cpu" else MADE
        for rows in _rows(len(x), unembedding.vocabulary, made):
            log_p = unembedding.logits(target[rows]).log_softmax(-1)
            log_q = unembedding.logits(x[rows]).log_softmax(-1)
            p = log_p.exp()
            terms = torch.linalg.vecdot(p, log_p.sub_(log_q))
            total = total + (terms if weights is None else terms * weights[rows]).sum()
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


def _rows(rows: int, width: int, at_once: int) -> list[slice]:
    """Some rows at a time, of ``at_once`` entries or one row."""
    n = max(1, at_once // width)
    return [slice(start, start + n) for start in range(0, rows, n)]


def kl_divergence(
    target_log_probs: Float[Tensor, "batch pos vocab"],
    logits: Float[Tensor, "batch pos vocab"],
    token_mask: Bool[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, ""]:
    """Mean KL(target ‖ masked) over positions where ``token_mask`` is True (None: all); no gradients reach the target."""
    rows, target = logits.flatten(0, -2), target_log_probs.flatten(0, -2)
    if token_mask is None:
        return _KL.apply(rows, target, None) / len(rows)
    return _KL.apply(rows, target, token_mask.flatten().float()) / token_mask.sum()


def unembedded_kl(
    target: Float[Tensor, "batch pos d_model"],
    output: Float[Tensor, "batch pos d_model"],
    unembedding: Unembedding,
    token_mask: Bool[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, ""]:
    """``kl_divergence`` of logits that are not there yet: both outputs are what the unembedding reads.

    Logits are made for a few tokens at a time, the target's as well, so that their memory does not grow with the tokens. Under
    ``no_grad`` no gradient is made either.
    """
    weights = None if token_mask is None else token_mask.flatten().float()
    total = _UnembeddedKL.apply(output.flatten(0, -2), target.flatten(0, -2), unembedding, weights)
    return total / (output[..., 0].numel() if weights is None else weights.sum())


def squared_error(
    target: Float[Tensor, "*batch d"],
    output: Float[Tensor, "*batch d"],
    token_mask: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, ""]:
    """Mean squared error over entries where ``token_mask`` is True (None: all)."""
    error = (output.float() - target.float()).square().mean(-1)
    return error.mean() if token_mask is None else error[token_mask].mean()


def next_token_ce(
    logits: Float[Tensor, "batch pos vocab"],
    tokens: Int[Tensor, "batch pos"],
    token_mask: Bool[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, ""]:
    """Mean cross-entropy of the next token in nats, over pairs of real tokens."""
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
    if token_mask is None:
        return losses.mean()
    return losses[(token_mask[:, :-1] & token_mask[:, 1:]).flatten()].mean()
