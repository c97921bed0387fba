"""Overlaps of groups whose members fire some tokens apart: a query's subcomponent with that of the key one token before.

Each member has an offset of 0 to L tokens, and a group is important at t where a member is at t − its offset (an *event*). Groups
i and j may be merged at every lag at which all offsets stay within L,

    s_ij(lag) = number of t at which i has an event, and j one at t + lag,

and the lag of the largest s_ij is taken, the smallest of equal ones. The union of the shifted events is again the events of a
group, so that description lengths stay exact. Rows are set apart by L empty places, and no event crosses from one to the next.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse
from jaxtyping import Bool, Int, Shaped

from tl_vpd.analysis.clustering.overlaps import Matrix, ones, packed

_ROWS = 512
"""Rows of a product that are dense at once."""


class LaggedOverlaps:
    """Counts as ``Overlaps`` has them, of the best lag of every pair.

    Args:
        important: ``[token, n]``, nonzero where a subcomponent is important; row after row.
        lengths: tokens of every row.
        lags: the largest offset, L.

    Attributes:
        k: how many groups there are.
        counts: events of each group, ``[n]``, of which the first k are in use.
        together: events that two groups have together at their best lag, ``[n, n]``.
        lag: that lag, by which the second one's events are later.
        reach: the largest offset of a member of each group.
    """

    def __init__(self, important: Matrix, lengths: Int[np.ndarray, " row"], lags: int) -> None:
        columns = scipy.sparse.csc_matrix(important, dtype=bool)
        n_tokens, self.k = columns.shape
        places = np.arange(n_tokens) + lags * np.repeat(np.arange(len(lengths)), lengths)
        shape = (n_tokens + lags * len(lengths), self.k)
        columns = scipy.sparse.csc_matrix((columns.data, places[columns.indices], columns.indptr), shape=shape)
        self.lags, self.words = lags, packed(columns)
        self.reach = np.zeros(self.k, dtype=np.int64)
        self.counts = np.diff(columns.indptr).astype(np.float64)
        self.together = np.zeros((self.k, self.k), dtype=np.float32 if shape[0] < 1 << 24 else np.float64)
        self.lag = np.zeros((self.k, self.k), dtype=np.int8)
        by_place = columns.tocsr().astype(self.together.dtype)
        for lag in range(lags + 1):
            earlier, later = by_place[: shape[0] - lag].T.tocsr(), by_place[lag:]
            for start in range(0, self.k, _ROWS):
                some = slice(start, start + _ROWS)
                counts = (earlier[some] @ later).toarray()
                self._improve(some, slice(None), counts, lag)
                self._improve(slice(None), some, counts.T, -lag)

    def _improve(self, rows: slice, others: slice, counts: Shaped[np.ndarray, "m n"], lag: int) -> None:
        """Takes a lag where its counts are larger than those so far."""
        together, at = self.together[rows, others], self.lag[rows, others]
        larger = counts > together
        together[larger], at[larger] = counts[larger], lag

    def merge(self, i: int, j: int) -> int:
        """Group i becomes the union with j, and the last group takes j's place; by how much j's events were later."""
        last, lag = self.k - 1, int(self.lag[i, j])
        self.words[i] = shifted(self.words[i], max(lag, 0)) | shifted(self.words[j], max(-lag, 0))
        self.reach[i] = max(self.reach[i] + max(lag, 0), self.reach[j] + max(-lag, 0))
        self.counts[i] = ones(self.words[i : i + 1])[0]
        if j != last:
            for values in (self.words, self.counts, self.reach):
                values[j] = values[last]
            for matrix in (self.together, self.lag):
                matrix[j, : self.k], matrix[: self.k, j] = matrix[last, : self.k], matrix[: self.k, last]
            self.together[j, j] = self.counts[j]
        self.k = last
        if i < last:
            self._count(i)
        return lag

    def _count(self, i: int) -> None:
        """Makes the row and the column of a group that has changed."""
        k = self.k
        best, at = np.full(k, -1, dtype=np.int64), np.zeros(k, dtype=np.int8)
        for lag in sorted(range(-self.lags, self.lags + 1), key=lambda lag: (abs(lag), -lag)):
            allowed = self._allowed(i, lag)
            if not allowed.any():
                continue
            events = shifted(self.words[i], lag)
            words = events.nonzero()[0]
            every = len(words) > len(events) // 2  # a gather costs as much as twice as many words in a row
            both = self.words[:k] & events if every else self.words[:k, words] & events[words]
            counts = np.where(allowed, ones(both), -1)
            larger = counts > best
            best[larger], at[larger] = counts[larger], lag
        self.together[i, :k], self.together[:k, i] = best, best
        self.lag[i, :k], self.lag[:k, i] = at, -at
        self.together[i, i], self.lag[i, i] = self.counts[i], 0

    def _allowed(self, i: int, lag: int) -> Bool[np.ndarray, " k"]:
        """Which groups can be merged with group i so that their events are later by a lag."""
        fits = self.reach[: self.k] + max(-lag, 0) <= self.lags
        return fits & bool(self.reach[i] + max(lag, 0) <= self.lags)


def shifted(words: Shaped[np.ndarray, " word"], by: int) -> Shaped[np.ndarray, " word"]:
    """Bits moved to places that are later by some (negative: earlier); those that leave the words are dropped."""
    if not by:
        return words.copy()
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    moved = np.zeros_like(bits)
    if by > 0:
        moved[by:] = bits[:-by]
    else:
        moved[:by] = bits[-by:]
    return np.packbits(moved, bitorder="little").view(np.uint64)
