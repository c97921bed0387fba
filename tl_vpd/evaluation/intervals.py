"""Means over rows of tokens with their confidence intervals.

Tokens of one row depend on each other, rows hardly do, so rows are resampled (percentile bootstrap; Efron 1979). A row counts
by its number of real tokens, as it does in the reported mean over tokens:

    mean = Σ_r n_r x_r / Σ_r n_r,        x_r the mean over the n_r tokens of row r

Below about twenty rows such intervals come out too narrow; a single row has none (NaN).

>>> PerRow(np.array([1.0, 3.0]), np.array([1.0, 3.0])).mean
2.5
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

CONFIDENCE = 0.95
RESAMPLES = 1000
METHOD = f"{CONFIDENCE:.0%} percentile bootstrap over rows, {RESAMPLES} resamples"


@dataclass(frozen=True)
class PerRow:
    """A figure of every row, and the number of tokens that it is the mean of."""

    values: Float[np.ndarray, " row"]
    tokens: Float[np.ndarray, " row"]

    @classmethod
    def concatenated(cls, batches: Sequence[PerRow]) -> PerRow:
        """The rows of several batches, one batch after the other."""
        return cls(np.concatenate([b.values for b in batches]), np.concatenate([b.tokens for b in batches]))

    @property
    def mean(self) -> float:
        """The mean over all tokens (NaN where there are none)."""
        total = float(self.tokens.sum())
        return float(self.values @ self.tokens) / total if total else float("nan")

    def interval(self, *, seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float]:
        """The percentile bootstrap interval of the mean (NaN, NaN for one row, or where no row counts).

        The same seed resamples the same rows for every figure.
        """
        n, nan = len(self.values), float("nan")
        if n < 2:
            return nan, nan
        counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples) * self.tokens
        total = counts.sum(1)
        means = (counts @ self.values)[total > 0] / total[total > 0]
        if not len(means):
            return nan, nan
        low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return float(low), float(high)

    def minus(self, other: PerRow) -> PerRow:
        """The paired difference, row by row."""
        return PerRow(self.values - other.values, self.tokens)

    def columns(self, name: str = "kl", *, seed: int = 0) -> dict[str, float]:
        """``{name, name_low, name_high}`` for a row of a table."""
        low, high = self.interval(seed=seed)
        return {name: self.mean, f"{name}_low": low, f"{name}_high": high}
