"""How far one output is from another: KL divergence of next-token distributions, or the squared error, in float32.

KL(target ‖ masked) = Σ_v p_v (log p_v − log q_v)       per position, then averaged over real positions, in nats
MSE(target, masked) = mean_d (t_d − y_d)²               for models whose output is no distribution
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def kl_divergence(
    target_log_probs: Float[Tensor, "batch pos vocab"],
    logits: Float[Tensor, "batch pos vocab"],
    keep: Bool[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, ""]:
    """Mean KL(target ‖ masked) over positions where ``keep`` is True (None: all)."""
    log_q = F.log_softmax(logits.float(), dim=-1)
    if keep is None:
        total = F.kl_div(log_q, target_log_probs, reduction="sum", log_target=True)
        return total / target_log_probs[..., 0].numel()
    per_position = F.kl_div(log_q, target_log_probs, reduction="none", log_target=True).sum(-1)
    return per_position[keep].mean()


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
