"""One subcomponent of a harvest: its numbers, windows, token tables and neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import pandas as pd
from jaxtyping import Int
from torch import Tensor

from tl_vpd.analysis.harvest.neighbours import Neighbours
from tl_vpd.analysis.harvest.tokens import TokenCounts
from tl_vpd.analysis.harvest.windows import Window
from tl_vpd.checks import integer
from tl_vpd.printing import Printed
from tl_vpd.site import Subcomponent

By = Literal["pmi", "recall"]


@dataclass(frozen=True)
class SubcomponentHarvest(Printed):
    """One subcomponent's statistics, windows and tokens.

    Attributes:
        subcomponent: its address.
        mean_importance: over real tokens.
        density: the fraction of real tokens with g > 0.
        firings: the number of tokens with g > threshold.
        mean_activation: the mean signed activation over firings (NaN without any).
        norm: ``‖V[:, c]‖ ‖U[c]‖``.
        windows: in order of the largest importance.
        samples: around random firings, in order of the importance there.
        histogram: how many importances lie in each bin of equal width in (0, 1].
    """

    subcomponent: Subcomponent
    mean_importance: float
    density: float
    firings: int
    mean_activation: float
    norm: float
    windows: tuple[Window, ...]
    samples: tuple[Window, ...]
    histogram: Int[Tensor, " bins"]
    _inputs: TokenCounts
    _outputs: TokenCounts
    _neighbours: Neighbours
    _i: int
    _names: Mapping[int, str]

    def input_tokens(self, k: int = 10, *, by: By = "pmi", min_count: int = 2) -> pd.DataFrame:
        """Tokens it fires at, ``min_count`` times or more: token_id, token, count, occurrences, recall, pmi."""
        return self._inputs.table(self._i, self._names, k=k, by=by, min_count=min_count)

    def output_tokens(self, k: int = 10, *, by: By = "pmi", min_count: int = 2) -> pd.DataFrame:
        """Tokens that follow where it fires, as ``input_tokens``. A row's last token, which none follows, is left out."""
        return self._outputs.table(self._i, self._names, k=k, by=by, min_count=min_count)

    def neighbours(self, k: int = 10, *, min_count: int = 2) -> pd.DataFrame:
        """Subcomponents that fire where it fires, or some tokens before or after it, by their Jaccard index.

        Args:
            k: how many pairs of subcomponent and lag.
            min_count: firings that they must have together.

        Returns:
            ``subcomponent``; ``lag``: how many tokens later it fires than this one (negative: earlier); ``together``: at how many
            tokens; ``jaccard``: divided by the number of tokens at which either fires.

        Raises:
            ValueError: the harvest did not count pairs (``HarvestConfig(lags=...)``).
        """
        return self._neighbours.table(self._i, k=k, min_count=min_count)

    def by_quantile(self, n: int = 4) -> list[tuple[Window, ...]]:
        """The samples in ``n`` groups of equal size by the importance there, from the largest; sizes differ by at most one."""
        n, total = integer("n", n, minimum=1), len(self.samples)
        return [self.samples[total * i // n : total * (i + 1) // n] for i in range(n)]

    def to_pandas(self) -> pd.DataFrame:
        """All windows, one row per token; see ``Window.to_pandas`` (``window`` numbers them)."""
        tables = [w.to_pandas().assign(window=i) for i, w in enumerate(self.windows)]
        return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
