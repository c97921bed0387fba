"""The last product of a transformer, ``logits = x @ W_U + b_U``, on its own.

Logits are the largest tensor of a small model with a large vocabulary. With the product in hand, a loss can make them for a few
tokens at a time (``tl_vpd.losses.divergence.unembedded_kl``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Unembedding:
    """``weight`` and ``bias`` of the product; both are constants."""

    weight: Float[Tensor, "vocab d_model"]
    bias: Float[Tensor, " vocab"] | None

    @property
    def vocabulary(self) -> int:
        """Logits of a token."""
        return len(self.weight)

    def to(self, dtype: torch.dtype) -> Unembedding:
        """The same, for products in another dtype."""
        return Unembedding(self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))

    def logits(self, x: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows vocab"]:
        """Logits in float32, from what the unembedding reads."""
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias).float()
