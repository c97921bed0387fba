"""Statistics of importances over all rows of a sample, from one pass: L0, what is alive, and how importance is spread."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_vpd.evaluation.batch import Batch
from tl_vpd.evaluation.intervals import PerRow
from tl_vpd.printing import Printed
from tl_vpd.site import ConcatenatedAxis

ALIVE = 1e-6
"""Mean importance above which a subcomponent counts as alive."""
SURE = 0.99
"""Importance from which a subcomponent counts as protected from any ablation."""


@dataclass(frozen=True)
class ImportanceStatistics(Printed):
    """Importances of all real tokens, summed up.

    ``mean``: by subcomponent. ``density``: the share of tokens at which each is above 0. ``in_rows``: the number of rows in which
    each is above 0 at any token. ``l0``: subcomponents above 0 per token, by row. ``largest``: of all. ``at_1``: the share of
    those above 0 that are at least 0.99. ``tokens_at_1``: the share of tokens at which any is.
    """

    n_tokens: int
    mean: Float[Tensor, " C_total"]
    density: Float[Tensor, " C_total"]
    in_rows: Int[Tensor, " C_total"]
    l0: PerRow
    largest: float
    at_1: float
    tokens_at_1: float

    @classmethod
    def over(cls, batches: Iterable[Batch], site_axis: ConcatenatedAxis) -> ImportanceStatistics:
        """The statistics of all batches."""
        l0: list[PerRow] = []
        sums, positive, in_rows = (
            torch.zeros(site_axis.total, dtype=dtype) for dtype in (torch.double, torch.long, torch.long)
        )
        n_tokens = sure = sure_tokens = 0
        largest = 0.0
        for batch in batches:
            g = batch.g
            # Sums of floats are far faster than of booleans, and exact up to 2^24.
            on = (g > 0).float().reshape(len(g), -1, site_axis.total).sum(1)
            at_1 = (g >= SURE).float().sum(-1)
            n_tokens += batch.n_tokens
            sums, positive, in_rows = (t.to(g.device) for t in (sums, positive, in_rows))
            sums += g.flatten(0, -2).sum(0)
            positive += on.long().sum(0)
            in_rows += (on > 0).sum(0)
            of_rows = on.double().sum(1).cpu().numpy()  # 0 at padding
            l0.append(PerRow(of_rows / batch.tokens_by_row.clip(min=1), batch.tokens_by_row))
            sure += int(at_1.long().sum())
            sure_tokens += int((at_1 > 0).sum())
            largest = max(largest, float(g.max()))
        return cls(
            n_tokens=n_tokens,
            mean=(sums / n_tokens).float(),
            density=positive / n_tokens,
            in_rows=in_rows,
            l0=PerRow.concatenated(l0),
            largest=largest,
            at_1=sure / max(int(positive.sum()), 1),
            tokens_at_1=sure_tokens / n_tokens,
        )

    @property
    def alive(self) -> Bool[Tensor, " C_total"]:
        """Which subcomponents have a mean importance above 1e-6."""
        return self.mean > ALIVE

    @property
    def one_row(self) -> float:
        """The share of all importance that lies on subcomponents which are important in a single row."""
        mass = float(self.mean.sum())
        return float(self.mean[self.in_rows == 1].sum()) / mass if mass else 0.0
