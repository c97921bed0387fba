"""What the pages read of each subcomponent: numbers as short as a reader needs them, tokens as numbers of one list.

=============  =====================================================================================
of a window    row, position, peak, tokens, importances in hundredths, activations in hundredths of ``scale``
of a token     number, count, recall in thousandths, PMI in hundredths of a nat
of a logit     token, logit
of a neighbour number, lag, firings together, Jaccard index in thousandths
of an edge     number (-1: the embeddings), weight
of a head      block, head, alignment
=============  =====================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from tl_vpd.analysis import Harvest, LogitEffects, SubcomponentHarvest, Window
from tl_vpd.analysis.attention.norms import norms_by_head
from tl_vpd.decomposition import Decomposition
from tl_vpd.viz.circuits import scale_of
from tl_vpd.viz.dashboard.config import DashboardConfig
from tl_vpd.viz.text import label

Record = dict[str, Any]


class Tokens:
    """The list of tokens that occur on the pages, in the order in which they were met."""

    def __init__(self) -> None:
        self.numbers: dict[int, int] = {}
        self.texts: list[str] = []

    def number(self, token_id: int, text: str) -> int:
        """A token's place in the list."""
        if token_id not in self.numbers:
            self.numbers[token_id] = len(self.texts)
            self.texts.append(label(text))
        return self.numbers[token_id]


class Records:
    """Subcomponents of a harvest as records.

    Args:
        decomposition: whose subcomponents.
        harvested: windows, counts and pairs.
        effects: logits (None: the model has none that stand alone).
        passed: heads of other blocks, by site and subcomponent.
        config: how much is shown.
    """

    def __init__(
        self,
        decomposition: Decomposition,
        harvested: Harvest,
        effects: LogitEffects | None,
        passed: Mapping[str, Sequence[Any]],
        config: DashboardConfig,
    ) -> None:
        self.harvested, self.effects, self.passed, self.config = harvested, effects, passed, config
        self.tokens = Tokens()
        self.places = {str(harvested.site_axis.at(c)): i for i, c in enumerate(harvested.chosen.tolist())}
        self.heads: dict[str, Tensor] = {
            name: norms_by_head(decomposition.V[name], decomposition.U[name], site).detach()
            for name, site in decomposition.sites.items()
            if site.n_heads is not None and site.short in ("q", "k", "v", "o")
        }

    def of(self, address: str) -> Record:
        """One subcomponent's."""
        one, config = self.harvested[address], self.config
        site, index = one.subcomponent.site, one.subcomponent.index
        windows, samples = one.windows[: config.windows], spread(one.samples, config.samples)
        scale = scale_of([*windows, *samples])
        heads = self.heads[site][index].tolist() if site in self.heads else []
        return {
            "norm": short(one.norm),
            "mean": short(one.mean_activation),
            "scale": short(scale),
            "windows": [self._window(w, scale) for w in windows],
            "samples": [self._window(w, scale) for w in samples],
            "inputs": self._tokens(one.input_tokens(config.tokens, min_count=config.min_count)),
            "outputs": self._tokens(one.output_tokens(config.tokens, min_count=config.min_count)),
            "histogram": one.histogram.tolist(),
            "logits": self._logits(address),
            "neighbours": self._neighbours(one),
            "heads": [short(norm) for norm in heads],
            "passed": self.passed[site][index] if site in self.passed else [],
        }

    def _window(self, window: Window, scale: float) -> list[Any]:
        radius, peak = self.config.radius, window.peak
        inside = slice(max(0, peak - radius), peak + radius + 1)
        pairs = zip(window.token_ids[inside], window.tokens[inside], strict=True)
        tokens = [self.tokens.number(i, text) for i, text in pairs]
        g = hundredths(window.importances[inside])
        a = hundredths(window.activations[inside] / scale if scale else window.activations[inside])
        return [window.row, window.pos, peak - inside.start, tokens, g, a]

    def _tokens(self, table: pd.DataFrame) -> list[list[Any]]:
        columns = zip(*(table[name] for name in ("token_id", "token", "count", "recall", "pmi")), strict=True)
        return [
            [self.tokens.number(int(i), text), int(count), round(1000 * recall), round(100 * pmi)]
            for i, text, count, recall, pmi in columns
        ]

    def _logits(self, address: str) -> list[list[Any]]:
        if self.effects is None or address not in self.effects:
            return []
        table = self.effects[address]
        return [
            [self.tokens.number(row["token_id"], row["token"]), short(row["logit"])] for row in table.to_dict("records")
        ]

    def _neighbours(self, one: SubcomponentHarvest) -> list[list[int]]:
        if not len(self.harvested.together) or not self.config.neighbours:
            return []
        table = one.neighbours(self.config.neighbours, min_count=self.config.min_count)
        return [
            [self.places[row["subcomponent"]], int(row["lag"]), int(row["together"]), round(1000 * row["jaccard"])]
            for row in table.to_dict("records")
        ]


def spread(windows: Sequence[Window], n: int) -> list[Window]:
    """``n`` of them, evenly spread over their order."""
    if len(windows) <= n:
        return list(windows)
    return [windows[i * (len(windows) - 1) // max(n - 1, 1)] for i in range(n)]


def hundredths(values: Tensor) -> list[int]:
    """Rounded, what is not a finite number as 0."""
    rounded: list[int] = (100 * values.float()).nan_to_num(0.0, 0.0, 0.0).round().to(torch.int64).tolist()
    return rounded


def short(value: float) -> float | None:
    """Three significant digits (None: not a finite number)."""
    return float(f"{value:.3g}") if math.isfinite(value) else None
