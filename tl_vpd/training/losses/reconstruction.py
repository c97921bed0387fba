"""Reconstruction: the masked model's output must be the target's.

For logits the KL divergence KL(target ‖ masked) averaged over positions, in float32; for other outputs the squared error.
Always on the model's final output.
"""

from __future__ import annotations

import copy
from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor

from tl_vpd.divergence import kl_divergence, squared_error


class Reconstruction:
    """The distance of masked outputs from one batch's target output, whose softmax is taken once."""

    def __init__(
        self,
        target: Float[Tensor, "batch *pos d"],
        kind: Literal["kl", "mse"] = "kl",
        keep: Bool[Tensor, "batch pos"] | None = None,
    ) -> None:
        self.kind, self.keep = kind, keep
        self.target = target.float().log_softmax(-1) if kind == "kl" else target.float()

    def rows(self, rows: slice) -> Reconstruction:
        """The distance for some rows of the batch."""
        own = copy.copy(self)
        own.target = self.target[rows]
        own.keep = None if self.keep is None else self.keep[rows]
        return own

    def __call__(self, output: Float[Tensor, "batch *pos d"]) -> Float[Tensor, ""]:
        """KL in nats, or the mean squared error."""
        if self.kind == "kl":
            return kl_divergence(self.target, output, self.keep)
        return squared_error(self.target, output, self.keep)
