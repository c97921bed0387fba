"""At how many tokens two groups are important together, for all pairs, while groups are merged.

    s_(i ∪ j) m = s_im + s_jm − s_ijm,        s_ijm: tokens at which all three are important

The last is counted at the tokens of i ∩ j alone: subcomponent by subcomponent where these are few, else on all groups' bits.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse
from jaxtyping import Int, Shaped

Matrix = scipy.sparse.csc_matrix
_BITS = np.array([bin(i).count("1") for i in range(256)], dtype=np.uint8)
_ROWS = 512
"""Rows of the product that are dense at once."""
_PER_WORD = 0.4
"""The time of one word of 64 tokens relative to that of one (token, subcomponent) pair."""


class Overlaps:
    """Counts of groups and of pairs of groups; group i is row i, and there are ``k``.

    Args:
        important: ``[token, n]``, nonzero where a subcomponent is important.

    Attributes:
        counts: tokens at which each group is important, ``[n]``, of which the first k are in use.
        together: tokens at which two are, ``[n, n]``, of which the first k rows and columns are in use.
    """

    def __init__(self, important: Matrix) -> None:
        columns = scipy.sparse.csc_matrix(important, dtype=bool)
        n_tokens, self.k = columns.shape
        exact = np.float32 if n_tokens < 1 << 24 else np.float64  # counts are integers
        self.by_token = columns.tocsr()
        self.per_token = np.diff(self.by_token.indptr)
        self.group = np.arange(self.k)
        self.words = packed(columns)
        rows = columns.T.tocsr().astype(exact)
        self.together = np.empty((self.k, self.k), dtype=exact)
        for start in range(0, self.k, _ROWS):
            self.together[start : start + _ROWS] = (rows[start : start + _ROWS] @ rows.T).toarray()
        self.counts = self.together.diagonal().astype(np.float64)

    def merge(self, i: int, j: int) -> int:
        """Group i becomes the union with j, and the last group takes j's place; the lag at which they were merged, 0."""
        k, last = self.k, self.k - 1
        row = self.together[i, :k] + self.together[j, :k] - self._in_all_three(i, j)
        union = self.counts[i] + self.counts[j] - self.together[i, j]
        self.words[i] |= self.words[j]
        self.together[i, :k], self.together[:k, i], self.together[i, i] = row, row, union
        self.counts[i] = union
        self.group[self.group == j] = i
        if j != last:
            self.together[j, :k], self.together[:k, j] = self.together[last, :k], self.together[:k, last]
            self.together[j, j] = self.counts[last]
            self.words[j], self.counts[j] = self.words[last], self.counts[last]
            self.group[self.group == last] = j
        self.k = last
        return 0

    def _in_all_three(self, i: int, j: int) -> Shaped[np.ndarray, " k"]:
        """``s_ijm`` for every group m."""
        both = self.words[i] & self.words[j]
        words = both.nonzero()[0]
        if not len(words):
            return np.zeros(self.k, dtype=self.together.dtype)
        tokens = np.unpackbits(both[words].view(np.uint8), bitorder="little").reshape(-1, 64).nonzero()
        tokens = words[tokens[0]] * 64 + tokens[1]
        if self.per_token[tokens].sum() + len(tokens) * self.k / 16 < _PER_WORD * self.k * len(words):
            return self._by_subcomponent(tokens)
        every = len(words) > self.words.shape[1] // 2  # a gather costs as much as twice as many words in a row
        shared = self.words[: self.k] & both if every else self.words[: self.k, words] & both[words]
        return ones(shared).astype(self.together.dtype)

    def _by_subcomponent(self, tokens: Int[np.ndarray, " m"]) -> Shaped[np.ndarray, " k"]:
        """At how many of these tokens each group is important, from the subcomponents that are important there."""
        lengths = self.per_token[tokens]
        ends = lengths.cumsum()
        entries = np.arange(ends[-1]) + np.repeat(self.by_token.indptr[tokens] - ends + lengths, lengths)
        present = np.zeros((len(tokens), self.k), dtype=bool)
        present[np.repeat(np.arange(len(tokens)), lengths), self.group[self.by_token.indices[entries]]] = True
        return present.sum(0, dtype=self.together.dtype)


def packed(important: Matrix) -> Shaped[np.ndarray, "k word"]:
    """Each column as bits, 64 tokens in a word."""
    columns = scipy.sparse.csc_matrix(important)
    n_tokens, k = columns.shape
    words = np.zeros((k, -(-n_tokens // 64)), dtype=np.uint64)
    for i in range(k):
        tokens = columns.indices[columns.indptr[i] : columns.indptr[i + 1]].astype(np.uint64)
        np.bitwise_or.at(words[i], tokens >> np.uint64(6), np.uint64(1) << (tokens & np.uint64(63)))
    return words


def ones(words: Shaped[np.ndarray, "k word"]) -> Int[np.ndarray, " k"]:
    """How many bits of each row are 1."""
    if hasattr(np, "bitwise_count"):  # NumPy 2
        return np.bitwise_count(words).sum(1, dtype=np.int64)
    return _BITS[words.view(np.uint8)].sum(1, dtype=np.int64)
