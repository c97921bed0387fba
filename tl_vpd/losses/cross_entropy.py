"""Cross-entropy of the next token, which evaluations report (VPD paper, section "The decomposition model behaves similarly …").

    CE = − log q_t(token_{t+1})                        averaged over pairs of neighbouring real tokens

In float32, or in float64 where the logits are. Without any pair of real tokens it is 0.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_vpd.losses.precision import at_least_float32


def next_token_ce(
    logits: Float[Tensor, "batch pos vocab"],
    tokens: Int[Tensor, "batch pos"],
    token_mask: Bool[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, ""]:
    """Mean cross-entropy of the next token, in nats.

    Args:
        logits: of the model at every position.
        tokens: that the model has read.
        token_mask: False at padding; pairs with a padded token are left out (None: no padding).
    """
    rows = at_least_float32(logits[:, :-1].flatten(0, 1))
    ce = F.cross_entropy(rows, tokens[:, 1:].flatten(), reduction="none")
    if token_mask is None:
        return ce.sum() / max(len(ce), 1)
    pairs = (token_mask[:, :-1] & token_mask[:, 1:]).flatten()
    return ce[pairs].sum() / pairs.sum().clamp(min=1)
