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

from tl_vpd.printing import Printed

CONFIDENCE = 0.95
RESAMPLES = 1000
AT_ONCE = 1 << 20
"""Rows of resamples that are in memory at once."""
METHOD = f"{CONFIDENCE:.0%} percentile bootstrap over rows, {RESAMPLES} resamples"


@dataclass(frozen=True)
class PerRow(Printed):
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
        return _quantiles(self.resampled(seed=seed, resamples=resamples))

    def resampled(self, *, seed: int = 0, resamples: int = RESAMPLES) -> Float[np.ndarray, " resample"]:
        """The means of resampled rows (none for one row; NaN where no row counts)."""
        n = len(self.values)
        if n < 2:
            return np.empty(0)
        generator, means = np.random.default_rng(seed % (1 << 64)), np.full(resamples, np.nan)
        size = max(1, AT_ONCE // n)
        for at in range(0, resamples, size):
            some = means[at : at + size]
            counts = generator.multinomial(n, np.full(n, 1 / n), size=len(some)) * self.tokens
            total = counts.sum(1)
            np.divide(counts @ self.values, total, out=some, where=total > 0)
        return means

    def minus(self, other: PerRow) -> PerRow:
        """The paired difference, row by row."""
        return PerRow(self.values - other.values, self.tokens)

    def columns(self, name: str = "kl", *, seed: int = 0) -> dict[str, float]:
        """``{name, name_low, name_high}`` for a row of a table."""
        low, high = self.interval(seed=seed)
        return {name: self.mean, f"{name}_low": low, f"{name}_high": high}


def interval_of_largest(figures: Sequence[PerRow], *, seed: int = 0) -> tuple[float, float]:
    """The interval of the largest of several means over the same rows, such as the worst of an attack's starts.

    Which is the largest is decided anew in every resample, so that the choice among them is part of the interval.
    """
    return _quantiles(np.max([figure.resampled(seed=seed) for figure in figures], axis=0))


def _quantiles(means: Float[np.ndarray, " resample"]) -> tuple[float, float]:
    means = means[~np.isnan(means)]
    if not len(means):
        return float("nan"), float("nan")
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
