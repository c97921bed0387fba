"""Running sums over batches: statistics, best windows, token counts and pairs of many subcomponents at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_vpd.analysis.harvest.config import HarvestConfig
from tl_vpd.analysis.harvest.neighbours import Together
from tl_vpd.analysis.harvest.result import Harvest
from tl_vpd.analysis.harvest.tokens import TokenCounts, count_tokens, total
from tl_vpd.analysis.harvest.windows import Windows, peaks, random_firings


class Tally:
    """Running sums, token counts and best windows of some subcomponents.

    Args:
        chosen: their concatenated positions.
        config: what is collected.
        limit: pairs of subcomponent and token that are counted.
    """

    def __init__(self, chosen: Int[Tensor, " C"], config: HarvestConfig, limit: int) -> None:
        self.chosen, self.config, self.n = chosen, config, 0
        C, device = len(chosen), chosen.device
        self.importance, self.activation = (torch.zeros(C, dtype=torch.float64, device=device) for _ in range(2))
        self.positive, self.firings = (torch.zeros(C, dtype=torch.int64, device=device) for _ in range(2))
        self.histogram = torch.zeros(C, config.bins, dtype=torch.int64, device=device)
        self.inputs, self.outputs = Pairs(limit), Pairs(limit)
        self.windows = Windows.none(C, config.windows, config.radius, device)
        self.samples = Windows.none(C, config.samples, config.radius, device)
        self.together = Together(config.lags, C)

    def add(
        self,
        tokens: Int[Tensor, "row pos"],
        real: Bool[Tensor, "row pos"],
        g: Float[Tensor, "row pos C"],
        a: Float[Tensor, "row pos C"],
        first_row: int,
    ) -> None:
        """Adds one batch of rows.

        Args:
            tokens: the rows.
            real: False at padding.
            g: importances, 0 at padding.
            a: activations.
            first_row: the number of the batch's first row.
        """
        fire = g > self.config.threshold
        fires = fire.float()  # sums of floats are far faster than of booleans, and exact up to 2^24
        self.n += int(real.sum())
        self.importance += g.sum((0, 1)).double()
        self.positive += (g > 0).float().sum((0, 1)).long()
        self.firings += fires.sum((0, 1)).long()
        self.activation += (a * fires).sum((0, 1)).double()
        self._count_in_bins(g)
        followed = real[:, :-1] & real[:, 1:]
        self.inputs.add(tokens[real], fires[real])
        self.outputs.add(tokens[:, 1:][followed], fires[:, :-1][followed])
        self.together.add(fire)
        shown = torch.where(real, tokens, -1)
        score, at = peaks(g, a)
        score = torch.where(g.gather(1, at[:, None])[:, 0] > self.config.threshold, score, -1.0)
        self.windows.add_(shown, g, a, (score, at), first_row)
        if self.config.samples:
            candidates = random_firings(fire, self.chosen, self.config.seed, first_row)
            self.samples.add_(shown, g, a, candidates, first_row)

    def _count_in_bins(self, g: Float[Tensor, "row pos C"]) -> None:
        C, bins = self.histogram.shape
        if bins:
            *_, c = where = (g > 0).nonzero(as_tuple=True)
            bin_of = c * bins + (g[where] * bins).ceil().long() - 1
            self.histogram += torch.bincount(bin_of, minlength=C * bins).view(C, bins)

    def result(self, names: Mapping[int, str], **rest: Any) -> Harvest:
        """The harvest of these batches.

        Args:
            names: texts of tokens.
            **rest: the fields of ``Harvest`` that are not summed here.
        """
        sums = ("n", "importance", "positive", "firings", "activation", "histogram", "windows", "samples")
        return Harvest(
            config=self.config,
            chosen=self.chosen,
            inputs=self.inputs.counts(),
            outputs=self.outputs.counts(),
            together=torch.from_numpy(self.together.counts),
            names=names,
            **{name: getattr(self, name) for name in sums},
            **rest,
        )


class Pairs:
    """Counts of (subcomponent, token) pairs, batch by batch.

    Args:
        limit: how many pairs; where there are more, the rarest are dropped.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self._size = limit, 0
        self._sum: TokenCounts | None = None
        self._recent: list[TokenCounts] = []

    def add(self, tokens: Int[Tensor, " m"], fires: Float[Tensor, "m C"]) -> None:
        """Counts ``m`` positions; ``fires`` is 1 or 0."""
        self._recent.append(count_tokens(tokens, fires))
        self._size += len(self._recent[-1].count)
        # Sorting all pairs at every batch would take longer than counting them.
        if self._size > min(self.limit, 100_000 + (0 if self._sum is None else len(self._sum.count)) // 2):
            self.counts()

    def counts(self) -> TokenCounts:
        """All counts."""
        before = [] if self._sum is None else [self._sum]
        self._sum, self._recent, self._size = total(before + self._recent, self.limit), [], 0
        return self._sum
