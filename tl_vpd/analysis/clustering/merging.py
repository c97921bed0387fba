"""Merging of subcomponents into groups by description length (VPD paper, clustering of subcomponents).

Where a group is important if any of its members is, a partition into k groups costs

    L = Σ_i s_i (log2 k + α · rank_i),    s_i: tokens at which group i is important,  rank_i: its number of members

bits: at every token, which groups are important, and α bits for every rank of each. Merging i and j, which are important together
at s_ij tokens, changes it by

    ΔL_ij = s_Σ log2((k − 1) / k) − s_ij log2(k − 1) + α (s_i r_j + s_j r_i − s_ij (r_i + r_j)),    s_Σ = Σ_i s_i.

In each round all pairs are ranked by that change, and the pair of rank n is merged with probability ∝ e^(−0.2 n), until one
group is left.

    >>> from scipy.sparse import csc_matrix
    >>> important = np.array([[1, 1, 0], [1, 1, 0], [0, 0, 1], [0, 0, 1]], dtype=bool)      # token × subcomponent
    >>> history = merge(csc_matrix(important), alpha=0.1, greed=50.0)
    >>> history.partition(1).tolist()                                                      # after one merge
    [0, 0, 1]

Exact, and fast enough for 10,000 subcomponents: a pair's change depends on the round through log2(k − 1) alone, which falls. So a
row's smallest change of an earlier round is a lower bound of today's, and only the few rows with the lowest bounds are looked at.
With ``lags`` groups have members that fire some tokens apart, and s counts their events (``lagged``); all else is the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from tl_vpd.analysis.clustering.lagged import LaggedOverlaps
from tl_vpd.analysis.clustering.overlaps import Matrix, Overlaps
from tl_vpd.printing import Printed


@dataclass(frozen=True)
class MergeHistory(Printed):
    """All merges, from every subcomponent alone to one group.

    Attributes:
        pairs: of each round, the smallest member of both groups that were merged.
        description_length: in bits, before the first round and after each.
        best_change: of each round, the smallest change of any pair, in bits.
        tokens: at which the merged group of each round is important.
        lags: at which lag each pair was merged: by how many tokens events of the second group were later (negative: earlier).
    """

    pairs: Int[np.ndarray, "round 2"]
    description_length: Float[np.ndarray, " length"]
    best_change: Float[np.ndarray, " round"]
    tokens: Int[np.ndarray, " round"]
    lags: Int[np.ndarray, " round"]

    @property
    def shortest(self) -> int:
        """The number of merges after which the description is shortest: there the change crosses 0."""
        return int(self.description_length.argmin())

    def partition(self, merges: int | None = None) -> Int[np.ndarray, " n"]:
        """The group of every subcomponent, numbered by first member.

        Args:
            merges: how many (None: as many as give the shortest description).
        """
        merges = self.shortest if merges is None else merges
        group = np.arange(len(self.pairs) + 1)
        for first, second in self.pairs[:merges][::-1]:  # backwards, a group's name is final when it is followed
            group[max(first, second)] = min(first, second)
        for i, parent in enumerate(group):  # a parent is smaller than its child, hence done before
            group[i] = group[parent]
        return np.unique(group, return_inverse=True)[1]

    def offsets(self, merges: int | None = None) -> Int[np.ndarray, " n"]:
        """How many tokens before its group's events each subcomponent is important.

        Args:
            merges: how many (None: as many as give the shortest description).
        """
        merges = self.shortest if merges is None else merges
        offsets, members = np.zeros(len(self.pairs) + 1, dtype=np.int64), {i: [i] for i in range(len(self.pairs) + 1)}
        for (first, second), lag in zip(self.pairs[:merges].tolist(), self.lags.tolist(), strict=False):
            offsets[members[first]] += max(lag, 0)
            offsets[members[second]] += max(-lag, 0)
            members[first] += members.pop(second)
        return offsets


def description_length(important: Bool[np.ndarray, "token n"], partition: Int[np.ndarray, " n"], alpha: float) -> float:
    """L in bits, from its definition.

    Args:
        important: which subcomponents are important at which tokens.
        partition: the group of every subcomponent.
        alpha: bits per rank.
    """
    groups = np.unique(partition)
    bits = 0.0
    for group in groups:
        members = partition == group
        bits += important[:, members].any(1).sum() * (np.log2(len(groups)) + alpha * members.sum())
    return float(bits)


def merge(
    important: Matrix,
    *,
    alpha: float,
    greed: float = 0.2,
    seed: int = 0,
    lags: int = 0,
    lengths: Int[np.ndarray, " row"] | None = None,
) -> MergeHistory:
    """Merges until one group is left.

    Args:
        important: ``[token, n]``, nonzero where subcomponent n is important; each must be somewhere.
        alpha: bits per rank; the larger, the smaller the groups.
        greed: the pair of rank n is chosen with probability ∝ ``e^(−greed · n)``.
        seed: of these choices.
        lags: up to how many tokens apart members may be important.
        lengths: tokens of every row, between which nothing is important together (None: there is one row).
    """
    rows = np.array([important.shape[0]]) if lengths is None else lengths
    overlaps = LaggedOverlaps(important, rows, lags) if lags else Overlaps(important)
    n, generator = overlaps.k, np.random.default_rng(seed % (1 << 64))
    rank, first = np.ones(n), np.arange(n)
    bound = np.full(n, -np.inf)
    pairs, changes, best, tokens, merged_at = [], [], [], [], []
    start = float(overlaps.counts.sum()) * (np.log2(n) + alpha)
    for k in range(n, 1, -1):
        # 1. The rank of the pair, of k (k − 1) / 2, from the geometric distribution.
        wanted = min(generator.geometric(-np.expm1(-greed)) - 1, k * (k - 1) // 2 - 1)
        # 2. That pair, and the smallest change.
        i, j, change, smallest = _pair_of_rank(overlaps, rank[:k], bound[:k], alpha, wanted)
        shift = overlaps.counts[:k].sum() * np.log2((k - 1) / k)
        changes.append(change + shift)
        best.append(smallest + shift)
        pairs.append((min(first[i], first[j]), max(first[i], first[j])))
        # 3. The merged group stands at i; the last one moves to j.
        lag = overlaps.merge(i, j)
        merged_at.append(lag if first[i] < first[j] else -lag)
        tokens.append(int(overlaps.counts[i]))
        rank[i] += rank[j]
        first[i] = min(first[i], first[j])
        for values in (rank, first, bound):
            values[j] = values[k - 1]
        if k > 2:
            row = _changes(overlaps, rank[: k - 1], np.array([i]), alpha)[0]
            bound[: k - 1] = np.minimum(bound[: k - 1], row)
            bound[i] = row.min()
    description = start + np.concatenate([[0.0], np.cumsum(changes)])
    integers = (np.array(values, dtype=np.int64) for values in (pairs, tokens, merged_at))
    merged, events, at = integers
    return MergeHistory(merged.reshape(-1, 2), description, np.array(best), events, at)


def _changes(
    overlaps: Overlaps | LaggedOverlaps, rank: Float[np.ndarray, " k"], rows: Int[np.ndarray, " m"], alpha: float
) -> Float[np.ndarray, "m k"]:
    """ΔL without its first term, which all pairs have, of the pairs of these rows; infinite on the diagonal."""
    k = len(rank)
    counts, together = overlaps.counts[:k], overlaps.together[rows, :k].astype(np.float64)
    r, s = rank[rows, None], counts[rows, None]
    result = alpha * (s * rank + counts * r) - together * (np.log2(k - 1) + alpha * (r + rank))
    result[np.arange(len(rows)), rows] = np.inf
    return result


def _pair_of_rank(
    overlaps: Overlaps | LaggedOverlaps,
    rank: Float[np.ndarray, " k"],
    bound: Float[np.ndarray, " k"],
    alpha: float,
    wanted: int,
) -> tuple[int, int, float, float]:
    """The pair of this rank (0: the smallest change), the lower row first, its change, and the smallest one.

    Bounds of rows that are looked at become exact.
    """
    k, m = len(rank), wanted + 2
    while True:
        rows, limit = np.arange(k), np.inf
        if m < k:
            order = np.argpartition(bound, m)
            rows, limit = order[:m], bound[order[m]]
        changes = _changes(overlaps, rank, rows, alpha)
        bound[rows] = changes.min(1)
        row, column = (
            changes <= min(limit, np.finfo(float).max)
        ).nonzero()  # all pairs up to the limit, some of them twice
        pairs = np.minimum(rows[row], column) * k + np.maximum(rows[row], column)
        pairs, where = np.unique(pairs, return_index=True)
        if len(pairs) > wanted:
            values = changes[row[where], column[where]]
            ranked = values.argsort(kind="stable")
            i, j = divmod(int(pairs[ranked[wanted]]), k)
            return i, j, float(values[ranked[wanted]]), float(values[ranked[0]])
        m = 2 * m
