"""Running sums over batches: statistics, best windows, token counts and pairs of many subcomponents at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_vpd.analysis.harvest.batch import Active, Batch
from tl_vpd.analysis.harvest.config import HarvestConfig
from tl_vpd.analysis.harvest.neighbours import Together
from tl_vpd.analysis.harvest.result import Harvest
from tl_vpd.analysis.harvest.tokens import Pairs
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
        self.inputs, self.outputs = (Pairs(C, limit, device) for _ in range(2))
        self.windows = Windows.none(C, config.windows, config.radius, device)
        self.samples = Windows.none(C, config.samples, config.radius, device)
        self.together = Together(config.lags, C)

    def add(self, batch: Batch, first_row: int) -> Active:
        """Adds one batch of rows, and gives where subcomponents are active in it.

        Args:
            batch: the rows.
            first_row: the number of the batch's first row.
        """
        active, shape = batch.active(), batch.tokens.shape
        positive, firing = active.above(0.0), active.above(self.config.threshold)
        self.n += int(batch.real.sum())
        self.importance.index_add_(0, active.c, active.g.double())
        self.activation.index_add_(0, firing.c, firing.a.double())
        self.positive += torch.bincount(positive.c, minlength=len(self.chosen))
        self.firings += torch.bincount(firing.c, minlength=len(self.chosen))
        self._count_in_bins(positive)
        shown = torch.where(batch.real, batch.tokens, -1)
        following = torch.where(batch.real, shown.roll(-1, 1), -1)
        following[:, -1] = -1
        self.inputs.add(shown.flatten(), firing.token, firing.c)
        self.outputs.add(following.flatten(), firing.token, firing.c)
        self.together.add(shape, firing.token, firing.c)
        self.windows.add_(batch, shown, peaks(firing, shape, len(self.chosen)), first_row)
        if self.config.samples:
            candidates = random_firings(firing.token, firing.c, shape, self.chosen, self.config.seed, first_row)
            self.samples.add_(batch, shown, candidates, first_row)
        return active

    def _count_in_bins(self, positive: Active) -> None:
        C, bins = self.histogram.shape
        if bins:
            bin_of = positive.c * bins + (positive.g * bins).ceil().long() - 1
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
