"""Running sums over batches: statistics, best windows and token counts of many subcomponents at once."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_vpd.analysis.records import Harvest, TokenCounts
from tl_vpd.checks import check_fields
from tl_vpd.decomposition import Decomposition


@dataclass(frozen=True)
class HarvestConfig:
    """What a harvest collects, and how many rows run at once.

    Attributes:
        windows: windows per subcomponent, at most one per row, in order of the largest importance.
        radius: tokens shown on each side of a window's peak.
        threshold: a subcomponent fires where g exceeds this.
        batch_size: rows run at once, which bounds memory.
        bins: of a histogram of every subcomponent's importances above 0, of equal width in (0, 1] (0: none is made).

    Raises:
        TypeError: a value is of another type.
        ValueError: a value is out of range.
    """

    windows: int = 8
    radius: int = 20
    threshold: float = 0.1
    batch_size: int = 32
    bins: int = 0

    def __post_init__(self) -> None:
        check_fields(self, windows=1, radius=0, batch_size=1, bins=0)
        if self.threshold == 1:
            raise ValueError("threshold=1: no importance exceeds 1, give a number of at least 0 and below 1.")


def peaks(
    g: Float[Tensor, "row pos C"], a: Float[Tensor, "row pos C"]
) -> tuple[Float[Tensor, "row C"], Int[Tensor, "row C"]]:
    """In every row the token of largest importance, as its score and position.

    Many importances are exactly 1: among equal ones the largest ``|activation|`` wins, within a row and between rows, so
    the score (float64) is ``g + 1e-6 |a| / (1 + |a|)``.
    """
    best = g.amax(1)
    size, at = torch.where(g == best[:, None], a.abs(), -1).max(1)
    size = size.double()
    return best.double() + 1e-6 * size / (1 + size), at


class Tally:
    """Running sums, token counts and best windows of ``C`` subcomponents.

    Args:
        C: how many.
        vocab: above the largest token.
        config: windows and threshold.
        device: of all sums.
    """

    def __init__(self, C: int, vocab: int, config: HarvestConfig, device: torch.device) -> None:
        windows, radius = config.windows, config.radius
        self.radius, self.threshold, self.n = radius, config.threshold, 0
        self.g, self.a = (torch.zeros(C, dtype=torch.float64, device=device) for _ in range(2))
        self.positive, self.firings = (torch.zeros(C, dtype=torch.int64, device=device) for _ in range(2))
        self.histogram = torch.zeros(C, config.bins, dtype=torch.int64, device=device)
        self.inputs, self.outputs = Pairs(C, vocab, device), Pairs(C, vocab, device)
        self.score = torch.full((C, windows), -1.0, dtype=torch.float64, device=device)
        self.rows, self.positions = (torch.full((C, windows), -1, device=device) for _ in range(2))
        self.shown = torch.zeros(2, C, windows, 2 * radius + 1, device=device)

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
            g: importances.
            a: activations.
            first_row: the number of the batch's first row.
        """
        wide = torch.promote_types(g.dtype, torch.float32)
        g, a = g.to(wide), a.to(wide)
        fires = (g > self.threshold).float()  # sums of floats are far faster than of booleans, and exact up to 2^24
        self.n += int(real.sum())
        self.g += g.sum((0, 1)).double()
        self.positive += (g > 0).float().sum((0, 1)).long()
        self.firings += fires.sum((0, 1)).long()
        self.a += (a * fires).sum((0, 1)).double()
        self._count_in_bins(g)
        followed = real[:, :-1] & real[:, 1:]
        self.inputs.add(tokens[real], fires[real])
        self.outputs.add(tokens[:, 1:][followed], fires[:, :-1][followed])
        self._update_best(g, a, first_row)

    def _count_in_bins(self, g: Float[Tensor, "row pos C"]) -> None:
        C, bins = self.histogram.shape
        if bins:
            *_, c = where = (g > 0).nonzero(as_tuple=True)
            bin_of = c * bins + (g[where] * bins).ceil().long() - 1
            self.histogram += torch.bincount(bin_of, minlength=C * bins).view(C, bins)

    def _update_best(self, g: Float[Tensor, "row pos C"], a: Float[Tensor, "row pos C"], first_row: int) -> None:
        n_rows, n_pos, C = g.shape
        windows = self.score.shape[1]
        score, at = peaks(g, a)
        score = torch.where(g.gather(1, at[:, None])[:, 0] > self.threshold, score, -1.0)
        self.score, source = torch.cat([self.score, score.T], 1).topk(windows, dim=1)
        rows = torch.arange(first_row, first_row + n_rows, device=score.device).expand(C, n_rows)
        self.rows = torch.cat([self.rows, rows], 1).gather(1, source)
        self.positions = torch.cat([self.positions, at.T], 1).gather(1, source)
        # Outside the row the value of the nearest token stands; ``cut`` leaves those positions out.
        around = torch.arange(-self.radius, self.radius + 1, device=score.device)
        pos = (self.positions[..., None] + around).clamp(0, n_pos - 1)
        row = (self.rows - first_row).clamp(0)[..., None]
        c = torch.arange(C, device=score.device)[:, None, None]
        fresh = torch.stack([g[row, pos, c], a[row, pos, c]])
        old = self.shown.gather(2, source.clamp(max=windows - 1)[None, ..., None].expand_as(self.shown))
        self.shown = torch.where((source >= windows)[None, ..., None], fresh.to(old), old)

    def result(
        self,
        decomposition: Decomposition,
        chosen: Int[Tensor, " C"],
        tokens: Int[Tensor, "n pos"],
        real: Bool[Tensor, "n pos"],
        names: Mapping[int, str],
    ) -> Harvest:
        """The harvest of all batches."""
        mean, activation = self.g / self.n, self.a / self.firings
        undefined = ~mean.isfinite() | ~(activation.isfinite() | (self.firings == 0))
        if bool(undefined.any()):
            first = decomposition.site_axis.at(int(chosen[undefined][0]))
            warnings.warn(
                f"Importances or activations of {int(undefined.sum())} of {len(undefined)} harvested subcomponents are NaN or "
                f"infinite, the first is {first}: look at the weights and at the model's activations.",
                RuntimeWarning,
                stacklevel=3,
            )
        norm = torch.cat(
            [decomposition.V[s].norm(dim=0) * decomposition.U[s].norm(dim=-1) for s in decomposition.sites]
        )
        return Harvest(
            site_axis=decomposition.site_axis,
            chosen=chosen,
            mean_importance=mean.float(),
            density=(self.positive / self.n).float(),
            firings=self.firings,
            mean_activation=activation.float(),
            norm=norm.detach()[chosen.to(norm.device)].to(chosen.device),
            rows=torch.where(self.score > 0, self.rows, -1),
            positions=self.positions,
            importances=self.shown[0],
            activations=self.shown[1],
            histogram=self.histogram,
            inputs=self.inputs.counts(),
            outputs=self.outputs.counts(),
            tokens=tokens,
            real=real,
            names=names,
            threshold=self.threshold,
            radius=self.radius,
        )


class Pairs:
    """Sparse counts of (subcomponent, token) pairs: most subcomponents fire at few of the tokens."""

    def __init__(self, C: int, vocab: int, device: torch.device) -> None:
        self.vocab, self.n = vocab, 0
        self.occurrences = torch.zeros(vocab, dtype=torch.int64, device=device)
        self.firings = torch.zeros(C, dtype=torch.int64, device=device)
        self.keys, self.values = (torch.zeros(0, dtype=torch.int64, device=device) for _ in range(2))

    def add(self, tokens: Int[Tensor, " m"], fires: Float[Tensor, "m C"]) -> None:
        """Counts ``m`` positions; ``fires`` is 1 or 0."""
        self.n += len(tokens)
        self.occurrences += torch.bincount(tokens, minlength=self.vocab)
        self.firings += fires.sum(0).long()
        distinct, inverse = tokens.unique(return_inverse=True)
        dense = torch.zeros(len(distinct), fires.shape[1], device=fires.device).index_add_(0, inverse, fires)
        t, c = dense.nonzero(as_tuple=True)
        keys = torch.cat([self.keys, c * self.vocab + distinct[t]])
        values = torch.cat([self.values, dense[t, c].long()])
        self.keys, inverse = keys.unique(return_inverse=True)
        self.values = torch.zeros_like(self.keys).index_add_(0, inverse, values)

    def counts(self) -> TokenCounts:
        """All counts."""
        index, token = self.keys // self.vocab, self.keys % self.vocab
        return TokenCounts(index, token, self.values, self.occurrences, self.firings, self.n)
