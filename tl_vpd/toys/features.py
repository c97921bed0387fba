"""Unlimited sparse feature vectors: every feature is off, or uniform in a range with a small probability.

    x_j = b_j · u_j,      b_j ~ Bernoulli(p),      u_j ~ U(low, high)

The batch of a step follows from seed and step alone. Rows have several vectors, independent of each other.

>>> SparseFeatures(n_features=5, probability=0.05, batch_size=4, context=8).at(0).shape
torch.Size([4, 8, 5])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tl_vpd.checks import check_fields
from tl_vpd.toys.toy import SeededBatches


@dataclass(frozen=True)
class SparseFeatures(SeededBatches):
    """Batches ``[batch_size, context, n_features]`` for ``tl_vpd.decompose`` and for training a target."""

    rows: ClassVar[str] = "sparse features"
    n_features: int
    probability: float
    batch_size: int
    """Rows in a batch."""
    context: int
    """Vectors in a row."""
    low: float = 0.0
    high: float = 1.0
    seed: int = 0
    only: Sequence[int] | None = None
    """The features that can be on, from 0 (None: all)."""

    def __post_init__(self) -> None:
        size = (1, 1 << 24)
        check_fields(self, n_features=1, probability=(0, 1), batch_size=size, context=size, only=0)
        if self.only is not None and not all(j < self.n_features for j in self.only):
            raise ValueError(f"only={self.only}: the features are 0 to {self.n_features - 1}.")
        if self.low > self.high:
            raise ValueError(f"low={self.low} is above high={self.high}: give the smaller number first.")

    def at(self, step: int) -> Float[Tensor, "batch pos features"]:
        """The batch of a step."""
        generator = self.generator("features", step)
        shape = (self.batch_size, self.context, self.n_features)
        values = torch.rand(shape, generator=generator).mul_(self.high - self.low).add_(self.low)
        on = torch.rand(shape, generator=generator) < self.probability
        if self.only is not None:
            on &= torch.isin(torch.arange(self.n_features), torch.tensor(self.only))
        return values.mul_(on)

    def describe(self) -> dict[str, Any]:
        """What distinguishes these data from others; without ``only`` as states of runs on all features have it."""
        return {name: value for name, value in super().describe().items() if name != "only" or value is not None}
