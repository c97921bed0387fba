"""Reconstruction: the masked model's output must be the target's.

For logits the KL divergence KL(target ‖ masked) averaged over positions, in float32; for other outputs the squared error.
Always on the model's final output.
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor

from tl_vpd.divergence import kl_divergence


class Reconstruction:
    """The distance of masked outputs from one batch's target output, whose softmax is taken once."""

    def __init__(
        self,
        target: Float[Tensor, "batch pos d"],
        kind: Literal["kl", "mse"] = "kl",
        keep: Bool[Tensor, "batch pos"] | None = None,
    ) -> None:
        self.kind, self.keep = kind, keep
        self.target = target.float().log_softmax(-1) if kind == "kl" else target.float()

    def __call__(self, output: Float[Tensor, "batch pos d"]) -> Float[Tensor, ""]:
        """KL in nats, or the mean squared error."""
        if self.kind == "kl":
            return kl_divergence(self.target, output, self.keep)
        error = (output.float() - self.target).square().mean(-1)
        return error.mean() if self.keep is None else error[self.keep].mean()
