"""Reconstruction: the masked model's output must be the target's.

For logits the KL divergence KL(target ‖ masked) averaged over positions, in float32; for other outputs the squared error.
Always on the model's final output.
"""

from __future__ import annotations

import copy
from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor

from tl_vpd.losses.divergence import kl_divergence, squared_error, unembedded_kl
from tl_vpd.losses.unembedding import Unembedding


class Reconstruction:
    """The distance of masked outputs from one batch's target output, whose softmax is taken once.

    With an ``unembedding``, outputs are what it reads, and logits are made for a few tokens at a time.
    """

    def __init__(
        self,
        target: Float[Tensor, "batch *pos d"],
        kind: Literal["kl", "mse"] = "kl",
        token_mask: Bool[Tensor, "batch pos"] | None = None,
        unembedding: Unembedding | None = None,
    ) -> None:
        self.kind, self.token_mask, self.unembedding = kind, token_mask, unembedding
        if unembedding is not None:
            self.target = target
        else:
            self.target = target.float().log_softmax(-1) if kind == "kl" else target.float()

    def rows(self, rows: slice) -> Reconstruction:
        """The distance for some rows of the batch."""
        own = copy.copy(self)
        own.target = self.target[rows]
        own.token_mask = None if self.token_mask is None else self.token_mask[rows]
        return own

    def __call__(self, output: Float[Tensor, "batch *pos d"]) -> Float[Tensor, ""]:
        """KL in nats, or the mean squared error."""
        if self.unembedding is not None:
            return unembedded_kl(self.target, output, self.unembedding, self.token_mask)
        if self.kind == "kl":
            return kl_divergence(self.target, output, self.token_mask)
        return squared_error(self.target, output, self.token_mask)
