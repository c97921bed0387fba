"""The union test: are explanations of different inputs true together?

If what Γ leaves out of an input may be ablated *fully or partly*, then adding another input's important set to it must change
nothing: the added subcomponents are among those that may or may not be present. So for a pair of inputs the union of both
important sets, at each position, has to serve both outputs. Adversarial training aims at this property, and a lookup table (a
subcomponent for every input) lacks it.

    M(t) = [g_a(t) > θ] ∪ [g_b(t) > θ],    Δ = 0:    KL(f(a) ‖ f_M(a)) and KL(f(b) ‖ f_M(b)) compared with each one's set alone

The control adds random alive subcomponents, site by site as many as the partner would.

    >>> union_test(sample, sizes=(2, 4))                      # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_vpd.checks import check_threshold, integer, sequence
from tl_vpd.evaluation.batch import Batch
from tl_vpd.evaluation.intervals import PerRow
from tl_vpd.evaluation.sample import Sample, measure
from tl_vpd.masking import constant_masks
from tl_vpd.site import ConcatenatedAxis


@dataclass(frozen=True)
class UnionDistances:
    """Distances with each row's important set ``alone``, with the ``union`` over its group and with a ``random`` one as large.

    ``rows``: the numbers of the rows, group after group.
    """

    alone: PerRow
    union: PerRow
    random: PerRow
    rows: list[int]


def union_of_groups(important: Bool[Tensor, "row *pos C_total"], size: int) -> Bool[Tensor, "row *pos C_total"]:
    """For rows in groups of ``size`` (which must divide their number) the union over the group, for each of its rows."""
    grouped = important.unflatten(0, (-1, size))
    return grouped.any(1, keepdim=True).expand_as(grouped).flatten(0, 1)


def with_random_partners(
    important: Bool[Tensor, "row *pos C_total"],
    union: Bool[Tensor, "row *pos C_total"],
    alive: Bool[Tensor, " C_total"],
    site_axis: ConcatenatedAxis,
    order: Float[Tensor, "row *pos C_total"],
) -> Bool[Tensor, "row *pos C_total"]:
    """The important set and, of each site, as many alive subcomponents outside it as the union adds.

    Args:
        important: the sets.
        union: over their groups.
        alive: the subcomponents that may be added.
        site_axis: of the last axis.
        order: random numbers from 0; those with the largest are added.
    """
    missing = alive & ~important
    order = order.masked_fill(~missing, -1.0)
    added = []
    for name, values in site_axis.split_sites((union & ~important).to(order.dtype)).items():
        rank = order[..., site_axis.slices[name]].argsort(-1, descending=True).argsort(-1)
        added.append((rank < values.sum(-1, keepdim=True)) & missing[..., site_axis.slices[name]])
    return important | torch.cat(added, dim=-1)


@measure
def union_distances(sample: Sample, size: int = 2, *, threshold: float = 0.0) -> UnionDistances:
    """Distances of rows in random groups of ``size``; rows that do not fill a group stay out.

    Args:
        sample: the rows.
        size: of a group.
        threshold: above which a subcomponent is important.

    Raises:
        ValueError: there are fewer rows than a group needs.
    """
    n, threshold = len(sample.rows), check_threshold(threshold)
    if not 2 <= integer("size", size) <= n:
        raise ValueError(f"Groups of {size} cannot be formed of {n} rows: give a size from 2 to {n}.")
    device = sample.masked_model.adapter.device
    order = torch.randperm(n, generator=sample.generator(11, size), device=device)[: n // size * size].tolist()
    alive = sample.statistics.mean > 0
    regrouped = sample.regrouped(order, size)
    distances: dict[str, list[PerRow]] = {"alone": [], "union": [], "random": []}
    for batch in regrouped.batches():
        for name, used in _sets(regrouped, batch, size, threshold, alive).items():
            masks = constant_masks(used.to(batch.g.dtype), 0.0, sample.site_axis)
            distances[name].append(batch.distance(regrouped.output(batch, masks)))
    by_name = {name: PerRow.concatenated(values) for name, values in distances.items()}
    return UnionDistances(**by_name, rows=regrouped.rows.numbers)


def _sets(
    sample: Sample, batch: Batch, size: int, threshold: float, alive: Bool[Tensor, " C_total"]
) -> dict[str, Bool[Tensor, "row *pos C_total"]]:
    """The sets that each row of a batch is run with."""
    important = batch.g > threshold
    union = union_of_groups(important, size)
    order = sample.uniform(f"random partners of {size}", batch.rows, batch.g.shape[1:])
    random = with_random_partners(important, union, alive, sample.site_axis, order)
    return {"alone": important, "union": union, "random": random}


def union_test(sample: Sample, *, sizes: Sequence[int] = (2, 4), threshold: float = 0.0) -> pd.DataFrame:
    """A row for each group size: KL with the set of each input, with the group's union, with a random one as large; intervals.

    ``added`` is the paired difference union − alone: above 0, what other inputs need disturbs this input.

    Args:
        sample: the rows.
        sizes: of the groups.
        threshold: above which a subcomponent is important.

    Raises:
        ValueError: there are fewer rows than a group needs.
    """
    sizes, table = sequence("sizes", sizes), []
    if not sizes:
        raise ValueError("sizes=[]: give at least one.")
    for size in sizes:
        result = union_distances(sample, size, threshold=threshold)
        table.append(
            {
                "inputs": size,
                "groups": len(result.rows) // size,
                **result.alone.columns("kl_alone", seed=sample.seed),
                **result.union.columns("kl_union", seed=sample.seed),
                **result.union.minus(result.alone).columns("added", seed=sample.seed),
                "kl_random_partner": result.random.mean,
                "worse": float(np.mean(result.union.values > result.alone.values)),
            }
        )
    return pd.DataFrame(table).set_index("inputs")


def union_test_pairs(sample: Sample, *, threshold: float = 0.0) -> pd.DataFrame:
    """A row for each pair of inputs: the rows' numbers, and the KL of both outputs alone and under the union.

    Args:
        sample: the rows.
        threshold: above which a subcomponent is important.
    """
    result = union_distances(sample, 2, threshold=threshold)
    columns = {"a": result.rows[::2], "b": result.rows[1::2]}
    for name, values in (("kl_alone", result.alone.values), ("kl_union", result.union.values)):
        columns |= {f"{name}_a": values[::2].tolist(), f"{name}_b": values[1::2].tolist()}
    return pd.DataFrame(columns)
