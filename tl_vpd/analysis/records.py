"""The results of a harvest: windows of text, token counts, and one record per subcomponent.

With ``N`` real tokens, ``n_f`` firings, ``n_t`` occurrences of token t and ``n_ft`` firings on it:

    recall(t) = n_ft / n_f                  the fraction of its firings that falls on t
    PMI(t)    = ln(n_ft N / (n_f n_t))      in nats: how much more often it fires on t than by chance
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_vpd.checks import choice, integer
from tl_vpd.site import ConcatenatedAxis, Subcomponent, nearest

By = Literal["pmi", "recall"]


def pmi(
    together: Float[Tensor, " token"], firings: int, occurrences: Float[Tensor, " token"], n: int
) -> Float[Tensor, " token"]:
    """``ln(together · n / (firings · occurrences))`` in nats; −inf where it never fires."""
    return (together * n / (firings * occurrences)).log()


def recall(together: Float[Tensor, " token"], firings: int) -> Float[Tensor, " token"]:
    """The fraction of the firings that falls on each token."""
    return together / firings


def cut(peak: int, radius: int, real: Bool[Tensor, " pos"]) -> tuple[int, int]:
    """Start and stop of the run of real tokens around ``peak``, at most ``radius`` to each side."""
    first = max(0, peak - radius)
    around = real[first : peak + radius + 1].tolist()
    before, after = around[: peak - first], around[peak - first + 1 :]
    start = peak - [*before[::-1], False].index(False)
    return start, peak + 1 + [*after, False].index(False)


@dataclass(frozen=True)
class Window:
    """A stretch of one row around its token of largest importance, at ``pos`` of the row and ``peak`` of the window."""

    row: int
    pos: int
    start: int
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    importances: Float[Tensor, " width"]
    activations: Float[Tensor, " width"]

    @property
    def peak(self) -> int:
        """The position of the token of largest importance within the window."""
        return self.pos - self.start

    def to_pandas(self) -> pd.DataFrame:
        """One row per token: row, pos, token_id, token, importance, activation."""
        return pd.DataFrame(
            {
                "row": self.row,
                "pos": range(self.start, self.start + len(self.tokens)),
                "token_id": self.token_ids,
                "token": self.tokens,
                "importance": self.importances.tolist(),
                "activation": self.activations.tolist(),
            }
        )


@dataclass(frozen=True)
class TokenCounts:
    """At which tokens subcomponents fired: sparse counts sorted by subcomponent, with the totals they are compared to.

    Attributes:
        index: the subcomponent of each pair.
        token: the token of each pair.
        count: how often it fired there.
        occurrences: of every token among the counted positions.
        firings: of every subcomponent.
        n: how many positions were counted.
    """

    index: Int[Tensor, " pair"]
    token: Int[Tensor, " pair"]
    count: Int[Tensor, " pair"]
    occurrences: Int[Tensor, " vocab"]
    firings: Int[Tensor, " C"]
    n: int

    def table(self, i: int, names: Mapping[int, str], *, k: int, by: str, min_count: int) -> pd.DataFrame:
        """The ``k`` best tokens of the i-th subcomponent by PMI or recall."""
        by = choice("by", by, ("pmi", "recall"))
        k, min_count = integer("k", k, minimum=0), integer("min_count", min_count, minimum=0)
        low, high = torch.searchsorted(self.index, torch.tensor([i, i + 1], device=self.index.device)).tolist()
        token, count = self.token[low:high], self.count[low:high]
        occurrences, firings = self.occurrences[token], int(self.firings[i])
        table = pd.DataFrame(
            {
                "token_id": token.tolist(),
                "token": [names[t] for t in token.tolist()],
                "count": count.tolist(),
                "occurrences": occurrences.tolist(),
                "recall": recall(count.double(), firings).tolist(),
                "pmi": pmi(count.double(), firings, occurrences.double(), self.n).tolist(),
            }
        )
        ties = ["recall" if by == "pmi" else "pmi", "token_id"]
        order = table[table["count"] >= min_count].sort_values([by, *ties], ascending=[False, False, True])
        return order.head(k).reset_index(drop=True)


@dataclass(frozen=True)
class SubcomponentHarvest:
    """One subcomponent's statistics, windows and tokens.

    Attributes:
        subcomponent: its address.
        mean_importance: over real tokens.
        density: the fraction of real tokens with g > 0.
        firings: the number of tokens with g > threshold.
        mean_activation: the mean signed activation over firings (NaN without any).
        norm: ``‖V[:, c]‖ ‖U[c]‖``.
        windows: in order of the largest importance.
        histogram: how many importances lie in each bin of equal width in (0, 1].
    """

    subcomponent: Subcomponent
    mean_importance: float
    density: float
    firings: int
    mean_activation: float
    norm: float
    windows: tuple[Window, ...]
    histogram: Int[Tensor, " bins"]
    _inputs: TokenCounts
    _outputs: TokenCounts
    _i: int
    _names: Mapping[int, str]

    def input_tokens(self, k: int = 10, *, by: By = "pmi", min_count: int = 2) -> pd.DataFrame:
        """Tokens it fires at, ``min_count`` times or more: token_id, token, count, occurrences, recall, pmi."""
        return self._inputs.table(self._i, self._names, k=k, by=by, min_count=min_count)

    def output_tokens(self, k: int = 10, *, by: By = "pmi", min_count: int = 2) -> pd.DataFrame:
        """Tokens that follow where it fires, as ``input_tokens``. A row's last token, which none follows, is left out."""
        return self._outputs.table(self._i, self._names, k=k, by=by, min_count=min_count)

    def to_pandas(self) -> pd.DataFrame:
        """All windows, one row per token; see ``Window.to_pandas`` (``window`` numbers them)."""
        tables = [w.to_pandas().assign(window=i) for i, w in enumerate(self.windows)]
        return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


@dataclass(frozen=True)
class Harvest:
    """Statistics, windows and token counts of the harvested subcomponents ``C``, on the model's device.

    ``chosen`` are their concatenated positions, ascending; ``rows`` is −1 where a subcomponent has fewer windows.
    ``histogram`` counts importances in bins of equal width in (0, 1].
    """

    site_axis: ConcatenatedAxis
    chosen: Int[Tensor, " C"]
    mean_importance: Float[Tensor, " C"]
    density: Float[Tensor, " C"]
    firings: Int[Tensor, " C"]
    mean_activation: Float[Tensor, " C"]
    norm: Float[Tensor, " C"]
    rows: Int[Tensor, "C window"]
    positions: Int[Tensor, "C window"]
    importances: Float[Tensor, "C window width"]
    activations: Float[Tensor, "C window width"]
    histogram: Int[Tensor, "C bins"]
    inputs: TokenCounts
    outputs: TokenCounts
    tokens: Int[Tensor, "n pos"]
    real: Bool[Tensor, "n pos"]
    names: Mapping[int, str]
    threshold: float
    radius: int

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, address: str | Subcomponent) -> SubcomponentHarvest:
        """One subcomponent; raises KeyError or IndexError if it does not exist, or KeyError if it was not harvested."""
        i = self._index(address)
        return SubcomponentHarvest(
            subcomponent=self.site_axis.at(int(self.chosen[i])),
            mean_importance=float(self.mean_importance[i]),
            density=float(self.density[i]),
            firings=int(self.firings[i]),
            mean_activation=float(self.mean_activation[i]),
            norm=float(self.norm[i]),
            windows=tuple(self._window(i, j) for j in range(self.rows.shape[1]) if self.rows[i, j] >= 0),
            histogram=self.histogram[i],
            _inputs=self.inputs,
            _outputs=self.outputs,
            _i=i,
            _names=self.names,
        )

    def to_pandas(self) -> pd.DataFrame:
        """One row per subcomponent: subcomponent, site, mean_importance, density, firings, mean_activation, norm."""
        subcomponents = [self.site_axis.at(i) for i in self.chosen.tolist()]
        return pd.DataFrame(
            {
                "subcomponent": [str(c) for c in subcomponents],
                "site": [c.site for c in subcomponents],
                "mean_importance": self.mean_importance.tolist(),
                "density": self.density.tolist(),
                "firings": self.firings.tolist(),
                "mean_activation": self.mean_activation.tolist(),
                "norm": self.norm.tolist(),
            }
        )

    def top(self, k: int = 10) -> pd.DataFrame:
        """The ``k`` subcomponents of the largest mean importance."""
        k = integer("k", k, minimum=0)
        ordered = self.to_pandas().sort_values("mean_importance", ascending=False, kind="stable")
        return ordered.head(k).reset_index(drop=True)

    def _index(self, address: str | Subcomponent) -> int:
        parsed = Subcomponent.parse(address)
        if parsed.site not in self.site_axis.slices:
            raise KeyError(f"{parsed.site!r} is not a decomposed site{nearest(parsed.site, self.site_axis.names)}.")
        count = self.site_axis.counts[parsed.site]
        if not 0 <= parsed.index < count:
            raise IndexError(f"{parsed} does not exist: {parsed.site} has {count} subcomponents, 0 to {count - 1}.")
        concatenated = self.site_axis.slices[parsed.site].start + parsed.index
        matches = (self.chosen == concatenated).nonzero()
        if not len(matches):
            raise KeyError(f"{parsed} was not harvested; name it in harvest(..., subcomponents=[...]).")
        return int(matches[0, 0])

    def _window(self, i: int, j: int) -> Window:
        row, pos = int(self.rows[i, j]), int(self.positions[i, j])
        start, stop = cut(pos, self.radius, self.real[row])
        inside = slice(start - pos + self.radius, stop - pos + self.radius)
        ids = tuple(self.tokens[row, start:stop].tolist())
        names = tuple(self.names[t] for t in ids)
        return Window(row, pos, start, ids, names, self.importances[i, j, inside], self.activations[i, j, inside])
