"""Which subcomponents fire together: at one token, or some tokens apart.

    together[ℓ, i, j]    at how many tokens t of one row i fires at t and j at t − ℓ
    jaccard              together / (firings of i + firings of j − together)

Together at a lag is what the same-position count cannot see: a query's subcomponent and the key's of the token before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.sparse
from jaxtyping import Int
from torch import Tensor

from tl_vpd.checks import integer
from tl_vpd.printing import Printed
from tl_vpd.site import ConcatenatedAxis


@dataclass(frozen=True)
class Neighbours(Printed):
    """Counts of pairs.

    Attributes:
        together: on the CPU; without any lag where pairs were not counted.
        firings: of every subcomponent.
        chosen: their concatenated positions.
        site_axis: of the decomposition.
    """

    together: Int[Tensor, "lag C C"]
    firings: Int[Tensor, " C"]
    chosen: Int[Tensor, " C"]
    site_axis: ConcatenatedAxis

    def table(self, i: int, *, k: int, min_count: int) -> pd.DataFrame:
        """The ``k`` best neighbours of the i-th subcomponent: subcomponent, lag, together, jaccard.

        Args:
            i: its place.
            k: how many pairs of subcomponent and lag.
            min_count: firings that they must have together.

        Raises:
            ValueError: pairs were not counted.
        """
        k, min_count = integer("k", k, minimum=0), integer("min_count", min_count, minimum=1)
        if not len(self.together):
            raise ValueError("This harvest did not count pairs: make it with HarvestConfig(lags=...).")
        # A row of the table per lag: j that many tokens earlier (i is the later one), and later.
        earlier, later = self.together[:, i].numpy(), self.together[1:, :, i].numpy()
        lags = np.arange(len(self.together))
        counts, lag = np.concatenate([earlier, later]), np.concatenate([-lags, lags[1:]])
        firings = self.firings.cpu().numpy()
        jaccard = counts / np.maximum(firings + firings[i] - counts, 1)
        jaccard[counts < min_count] = 0
        jaccard[0, i] = 0  # with itself, at one token
        flat = np.argsort(-jaccard, axis=None, kind="stable")[:k]
        flat = flat[jaccard.flat[flat] > 0]
        which, other = np.unravel_index(flat, jaccard.shape)
        return pd.DataFrame(
            {
                "subcomponent": [str(self.site_axis.at(int(self.chosen[j]))) for j in other],
                "lag": lag[which],
                "together": counts[which, other],
                "jaccard": jaccard[which, other],
            }
        )


class Together:
    """Counts pairs of subcomponents batch by batch, ``[lag, C, C]``, on the CPU.

    Args:
        lags: the largest lag (None: nothing is counted).
        C: number of subcomponents.
    """

    def __init__(self, lags: int | None, C: int) -> None:
        self.counts = np.zeros((0 if lags is None else lags + 1, C, C), dtype=np.int32)

    def add(self, shape: Sequence[int], token: Int[Tensor, " n"], c: Int[Tensor, " n"]) -> None:
        """Adds a batch of rows.

        Args:
            shape: rows and positions.
            token: where subcomponents fire, ``row * n_pos + pos``.
            c: these subcomponents.
        """
        n_lags, C, _ = self.counts.shape
        if not n_lags:
            return
        (n_rows, n_pos), at, columns = shape, token.cpu().numpy(), c.cpu().numpy()
        # Rows are set apart by as many empty tokens as the largest lag, so that no pair crosses from one to the next.
        stride = n_pos + n_lags - 1
        entries = np.ones(len(at), dtype=np.int32), (at + at // n_pos * (n_lags - 1), columns)
        matrix = scipy.sparse.csr_matrix(entries, shape=(n_rows * stride, C))
        for lag in range(n_lags):
            later, earlier = matrix[lag:].T.tocsr(), matrix[: matrix.shape[0] - lag]
            for start in range(0, C, 512):
                self.counts[lag, start : start + 512] += (later[start : start + 512] @ earlier).toarray()
