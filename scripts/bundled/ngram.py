"""An interpolated Kneser–Ney trigram: what the bundled model must beat.

    p(w | u v) = (c(uvw) − D₃)⁺ / c(uv·) + λ(uv) · p(w | v),       p(w | v) and p(w) from continuation counts

with one discount per order, ``D = n₁ / (n₁ + 2 n₂)`` (Kneser and Ney 1995; interpolated as in Chen and Goodman 1999).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int


class KneserNeyTrigram:
    """Trigram probabilities from one stream of token ids."""

    def __init__(self, stream: Int[np.ndarray, " tokens"], vocabulary: int) -> None:
        self.V = vocabulary
        ids = stream.astype(np.int64)
        u, v, w = ids[:-2], ids[1:-1], ids[2:]
        self.trigrams = _Level((u * self.V + v) * self.V + w, self.V)
        # A bigram's count is the number of different words before it; likewise for single words.
        middle = np.unique((u * self.V + v) * self.V + w) % (self.V * self.V)
        self.bigrams = _Level(middle, self.V)
        self.words = _Level(np.unique(middle) % self.V, self.V)

    def log_probability(self, context: Int[np.ndarray, "n 2"], word: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """``log p(word | context)`` in nats."""
        u, v, w = context[:, 0].astype(np.int64), context[:, 1].astype(np.int64), word.astype(np.int64)
        p = self.words.probability(w, np.full(len(w), 1.0 / self.V))
        p = self.bigrams.probability(v * self.V + w, p)
        return np.log(self.trigrams.probability((u * self.V + v) * self.V + w, p))


class _Level:
    """One order: counts of n-grams, totals and numbers of continuations of their histories."""

    def __init__(self, grams: Int[np.ndarray, " n"], vocabulary: int) -> None:
        self.V = vocabulary
        self.grams, self.counts = np.unique(grams, return_counts=True)
        self.histories, start = np.unique(self.grams // vocabulary, return_index=True)
        self.totals = np.add.reduceat(self.counts, start)
        self.kinds = np.diff(np.append(start, len(self.grams)))
        ones, twos = (self.counts == 1).sum(), (self.counts == 2).sum()
        self.discount = ones / (ones + 2 * twos) if twos else 0.75

    def probability(self, gram: Int[np.ndarray, " n"], lower: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        count = _look_up(self.grams, self.counts, gram)
        history = gram // self.V
        total = _look_up(self.histories, self.totals, history)
        kinds = _look_up(self.histories, self.kinds, history)
        discounted = np.maximum(count - self.discount, 0) / np.maximum(total, 1)
        rest = np.where(total > 0, self.discount * kinds / np.maximum(total, 1), 1.0)
        return discounted + rest * lower


def _look_up(
    keys: Int[np.ndarray, " m"], values: Int[np.ndarray, " m"], queries: Int[np.ndarray, " n"]
) -> Int[np.ndarray, " n"]:
    where = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
    return np.where(keys[where] == queries, values[where], 0)
