"""Redundancy: which subcomponents have a hidden twin, that would do their work if they were gone?

A decomposition calls as little important as reproduces the output. Where a model can do the same in two ways, one of them may be
called unimportant at every token: it is hidden. Then what does the work can be ablated in the full model, where the other way
takes over, but not among the important subcomponents alone (redundancy test; Vigouroux & Sharkey, arXiv 2607.13047):

    alone_c = KL(f ‖ important without c) − KL(f ‖ important),      full_c = KL(f ‖ f without c)
    twin_c: alone_c > 0.2 and full_c < 0.1

``important``: rounded masks, Δ 0. c is ablated at every token, and both are summed over all tokens of a row (what a key or value
does shows at later tokens) and divided by the number of tokens at which c is important: nats per token at which it is.

    >>> result = redundancy(vpd, model, tokens)               # doctest: +SKIP
    >>> result.twins, result.top(10)                          # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_vpd.checks import instance, integer, sequence
from tl_vpd.decomposition import Decomposition
from tl_vpd.evaluation.batch import Batch
from tl_vpd.evaluation.sample import Sample, measure, sampled
from tl_vpd.masking import constant_masks
from tl_vpd.printing import Printed
from tl_vpd.site import Subcomponent

HURTS, SPARED = 0.2, 0.1
"""Nats from which ablating hurts, and below which it does not (the source's limits)."""


@dataclass(frozen=True)
class Redundancy(Printed):
    """Every subcomponent's two figures.

    Attributes:
        subcomponents: addresses.
        alone: KL that ablating adds among the important ones alone, in nats per token at which it is important (NaN: important
            nowhere on these rows).
        full: KL that ablating costs in the full model, in the same unit.
        tokens: at which it is important, of the rows used.
        rows: that were used.
    """

    subcomponents: tuple[str, ...]
    alone: Float[Tensor, " n"]
    full: Float[Tensor, " n"]
    tokens: Int[Tensor, " n"]
    rows: Int[Tensor, " n"]

    @property
    def has_twin(self) -> Bool[Tensor, " n"]:
        """Which have a hidden twin: ``alone`` above 0.2 and ``full`` below 0.1."""
        return (self.alone > HURTS) & (self.full < SPARED)

    @property
    def twins(self) -> list[str]:
        """The addresses of those, the largest ``alone`` first."""
        order = self.alone.nan_to_num(-torch.inf).argsort(descending=True, stable=True).tolist()
        return [self.subcomponents[i] for i in order if self.has_twin[i]]

    def to_pandas(self) -> pd.DataFrame:
        """A row for each subcomponent."""
        columns = {name: getattr(self, name).tolist() for name in ("alone", "full", "has_twin", "tokens", "rows")}
        return pd.DataFrame({"subcomponent": list(self.subcomponents), **columns}).set_index("subcomponent")

    def top(self, k: int = 10) -> pd.DataFrame:
        """The k rows with the largest ``alone − full``.

        Raises:
            ValueError: k is below 1.
        """
        table = self.to_pandas()
        order = (table["alone"] - table["full"]).sort_values(ascending=False, kind="stable").index
        return table.loc[order[: integer("k", k, minimum=1)]]


def redundancy(
    decomposition: Decomposition,
    model: nn.Module,
    prompts: Any,
    subcomponents: Sequence[str | Subcomponent] | None = None,
    *,
    rows: int = 4,
    batch_size: int = 16,
    seed: int = 0,
) -> Redundancy:
    """Looks for hidden twins on prompts.

    Each subcomponent is ablated in up to ``rows`` rows, twice; the cost is ``2 · rows · len(subcomponents) / batch_size`` masked
    passes of ``batch_size`` rows.

    Args:
        decomposition: of the model.
        model: the target, which returns logits.
        prompts: strings or rows of tokens; padding is left out.
        subcomponents: addresses (None: all that are important somewhere on these prompts).
        rows: in which each is ablated: random ones among those in which it is important.
        batch_size: how many rows run together; figures do not depend on it.
        seed: of the choice of rows.

    Raises:
        KeyError: a subcomponent's site is not decomposed.
        IndexError: a site has no such subcomponent.
        TypeError: an argument is of another type.
        ValueError: the model returns no logits, the decomposition or prompts do not fit it, or a number is out of its range.
    """
    instance("decomposition", decomposition, Decomposition)
    rows = integer("rows", rows, minimum=1)
    addresses = None
    if subcomponents is not None:
        addresses = [decomposition.subcomponent(c) for c in sequence("subcomponents", subcomponents)]
    with sampled(decomposition, model, prompts, batch_size=batch_size, seed=seed) as sample:
        if not sample.has_logits:
            raise ValueError("This model returns no logits, and redundancy is judged in nats: give a language model.")
        return _redundancy(sample, addresses, rows)


@measure
def _redundancy(sample: Sample, addresses: list[Subcomponent] | None, n_rows: int) -> Redundancy:
    axis = sample.site_axis
    counts = torch.cat(
        [(b.g > 0).sum(1) for b in sample.batches()]
    ).cpu()  # tokens, by row and subcomponent; 0 at padding
    if addresses is None:
        by_site = axis.split_sites((counts.sum(0) > 0)[None])
        addresses = [Subcomponent(name, i) for name, on in by_site.items() for i in on[0].nonzero()[:, 0].tolist()]
    columns = [axis.slices[c.site].start + c.index for c in addresses]
    order = torch.randperm(len(counts), generator=torch.Generator().manual_seed(sample.seed))
    chosen = [order[counts[order, column] > 0][:n_rows].tolist() for column in columns]
    in_row: list[list[int]] = [[k for k, rows in enumerate(chosen) if row in rows] for row in range(len(counts))]
    sums = torch.zeros(2, len(columns), dtype=torch.float64)
    row = 0
    for batch in sample.batches():
        for i in range(len(batch.rows)):
            if in_row[row]:
                sums[:, in_row[row]] += _of_row(sample, batch, i, [columns[k] for k in in_row[row]])
            row += 1
    tokens = torch.tensor(
        [int(counts[rows, c].sum()) for rows, c in zip(chosen, columns, strict=True)], dtype=torch.long
    )
    alone, full = sums / tokens
    n_used = torch.tensor([len(rows) for rows in chosen], dtype=torch.long)
    return Redundancy(tuple(map(str, addresses)), alone, full, tokens, n_used)


def _of_row(sample: Sample, batch: Batch, i: int, columns: list[int]) -> Float[Tensor, "2 n"]:
    """What ablating subcomponents (by their place on the concatenated axis) adds to the distance of row i of a batch, summed over
    its tokens: among the important ones alone, and in the full model.
    """
    rows, distance = batch.rows.take([i]), batch.reconstruction.rows(slice(i, i + 1))
    important = (batch.g[i : i + 1] > 0).to(batch.g.dtype)
    without: list[int | None] = [None, *columns]

    def distances(mask: Float[Tensor, "1 _ C_total"], delta: float) -> Float[Tensor, " _"]:
        """The distance under a mask, and under it without each subcomponent."""
        results = []
        for at in range(0, len(without), sample.batch_size):
            some = without[at : at + sample.batch_size]
            masks = mask.repeat(len(some), 1, 1)
            for m, column in zip(masks, some, strict=True):
                if column is not None:
                    m[:, column] = 0.0
            output = sample.masked_model.masked(
                rows.tokens.expand(len(some), -1),
                constant_masks(masks, delta, sample.site_axis),
                None if rows.token_mask is None else rows.token_mask.expand(len(some), -1),
                start=None if batch.residual is None else batch.residual[i : i + 1].expand(len(some), -1, -1),
            )
            results += [float(distance(output[j : j + 1])) for j in range(len(some))]
        return torch.tensor(results, dtype=torch.float64)

    both = torch.stack([distances(important, 0.0), distances(torch.ones_like(important[:, :1]), 1.0)])
    return (both[:, 1:] - both[:, :1]) * int(batch.real[i].sum())
