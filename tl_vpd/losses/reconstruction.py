"""Reconstruction: the masked model's final output must be the target's.

    L_recon = mean over real positions of D(target output, masked output)       D: KL divergence of logits, or squared error

Source: VPD paper, section "Optimizing for mechanistic faithfulness". With masks uniform between importance and 1 it is the
stochastic loss, with the adversary's masks the adversarial one.
"""

from __future__ import annotations

import copy
from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor

from tl_vpd.checks import choice
from tl_vpd.losses.kl import kl_divergence
from tl_vpd.losses.precision import at_least_float32
from tl_vpd.losses.squared_error import squared_error
from tl_vpd.losses.unembedding import Unembedding, unembedded_kl


class Reconstruction:
    """The distance of masked outputs from one batch's target output, whose softmax is computed once.

    Args:
        target: output of the target model; with ``unembedding``, the input of its unembedding.
        kind: ``kl`` for logits (nats), ``mse`` for other outputs.
        token_mask: False at padding, which the mean leaves out (None: no padding).
        unembedding: makes logits of outputs, a block of tokens at a time (None: outputs are compared directly).

    Raises:
        ValueError: there is no such kind.
    """

    def __init__(
        self,
        target: Float[Tensor, "batch *pos d"],
        kind: Literal["kl", "mse"] = "kl",
        token_mask: Bool[Tensor, "batch pos"] | None = None,
        unembedding: Unembedding | None = None,
    ) -> None:
        choice("kind", kind, ("kl", "mse"))
        self.kind, self.token_mask, self.unembedding = kind, token_mask, unembedding
        if unembedding is not None:
            self.target = target
        else:
            target = at_least_float32(target)
            self.target = target.log_softmax(-1) if kind == "kl" else target

    def rows(self, rows: slice) -> Reconstruction:
        """The distance for a slice of the batch."""
        part = copy.copy(self)
        part.target = self.target[rows]
        part.token_mask = None if self.token_mask is None else self.token_mask[rows]
        return part

    def __call__(self, output: Float[Tensor, "batch *pos d"]) -> Float[Tensor, ""]:
        """The distance of an output: KL divergence in nats, or mean squared error."""
        if self.unembedding is not None:
            return unembedded_kl(self.target, output, self.unembedding, self.token_mask)
        if self.kind == "kl":
            return kl_divergence(self.target, output, self.token_mask)
        return squared_error(self.target, output, self.token_mask)
