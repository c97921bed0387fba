"""Aggregation: are explanations of different inputs true together?

If what Γ leaves out of an input may be ablated *fully or partly*, then adding another input's important set to it must change
nothing: the added subcomponents are among those that may or may not be there. So for a pair of inputs the union of both
important sets, at each position, has to serve both outputs. It is the property that adversarial training is for, and the one
that a lookup table (a subcomponent for every input) lacks.

    M(t) = [g_a(t) > θ] ∪ [g_b(t) > θ],    Δ = 0:    KL(f(a) ‖ f_M(a)) and KL(f(b) ‖ f_M(b)) beside each one's set alone

The control adds random alive subcomponents, site by site as many as the partner would.

    >>> aggregation(sample, sizes=(2, 4))                      # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from tl_vpd.evaluation.intervals import PerRow
from tl_vpd.evaluation.sample import Sample
from tl_vpd.masking import constant_masks
from tl_vpd.site import ConcatenatedAxis


def union_of_groups(important: Bool[Tensor, "row *pos C_total"], size: int) -> Bool[Tensor, "row *pos C_total"]:
    """For rows in groups of ``size`` (which must divide their number) the union over the group, for every row of it."""
    grouped = important.unflatten(0, (-1, size))
    return grouped.any(1, keepdim=True).expand_as(grouped).flatten(0, 1)


def with_random_partners(
    own: Bool[Tensor, "row *pos C_total"],
    union: Bool[Tensor, "row *pos C_total"],
    alive: Bool[Tensor, " C_total"],
    site_axis: ConcatenatedAxis,
    generator: torch.Generator,
) -> Bool[Tensor, "row *pos C_total"]:
    """The own set and, of each site, as many random alive subcomponents that it lacks as the union adds."""
    added = (union & ~own).to(torch.float32)
    lead = added.shape[:-1]
    flat = added.reshape(1, -1, site_axis.total)
    missing = (alive & ~own).reshape(1, -1, site_axis.total)
    parts = []
    for name, values in site_axis.split_sites(flat).items():
        draw = torch.rand(values.shape, generator=generator, device=values.device)
        strength = draw.masked_fill(~missing[..., site_axis.slices[name]], -1.0)
        rank = strength.argsort(-1, descending=True).argsort(-1)
        parts.append((rank < values.sum(-1, keepdim=True)) & (strength >= 0))
    return own | torch.cat(parts, dim=-1).reshape(*lead, site_axis.total)


@torch.no_grad()
def aggregation_by_row(sample: Sample, size: int = 2, *, threshold: float = 0.0) -> dict[str, PerRow]:
    """Distances with each row's set ``alone``, with the ``union`` over its group of ``size`` rows, and the ``random`` control.

    Rows are grouped at random (a group may span batches); rows that are left over stay out of all three. The dict's
    fourth entry, ``order``, says which rows: group after group, as values.

    Raises:
        ValueError: there are fewer rows than a group has.
    """
    rows = sum(len(t) for t in sample.tokens)
    if not 2 <= size <= rows:
        raise ValueError(f"Groups of {size} cannot be formed of {rows} rows: give a size from 2 to {rows}.")
    generator = sample.generator(11, size)
    order = torch.randperm(rows, generator=generator, device=sample.g[0].device)[: rows // size * size]
    important = torch.cat(sample.g)[order] > threshold
    alive = torch.cat([g.flatten(0, -2) for g in sample.g]).sum(0) > 0
    sets = {"alone": important, "union": union_of_groups(important, size)}
    sets["random"] = with_random_partners(important, sets["union"], alive, sample.site_axis, generator)
    back = torch.full((rows,), -1, device=order.device)
    back[order] = torch.arange(len(order), device=order.device)
    found = {name: _distances(sample, kept, back) for name, kept in sets.items()}
    in_order = {name: PerRow(own.values[order.cpu()], own.tokens[order.cpu()]) for name, own in found.items()}
    return {**in_order, "order": PerRow(order.cpu().numpy().astype(float), in_order["alone"].tokens)}


def _distances(sample: Sample, kept: Bool[Tensor, "chosen *pos C_total"], back: Tensor) -> PerRow:
    """Distances of all rows in the sample's own order under masks that stand in another (rows without any: unmasked)."""
    first = 0
    parts = []
    for i, t in enumerate(sample.tokens):
        where = back[first : first + len(t)]
        mask = torch.ones_like(sample.g[i])
        chosen = where >= 0
        mask[chosen] = kept[where[chosen]].to(mask.dtype)
        parts.append(sample.distance(i, sample.output(i, constant_masks(mask, 0.0, sample.site_axis))))
        first += len(t)
    return PerRow.joined(parts)


def aggregation(sample: Sample, *, sizes: Sequence[int] = (2, 4), threshold: float = 0.0) -> pd.DataFrame:
    """A row a group size: KL with each input's own set, with the group's union, with a random one as large; and intervals.

    ``added`` is the paired difference union − alone: above 0, what other inputs need is in this input's way.
    """
    rows = []
    for size in sizes:
        found = aggregation_by_row(sample, size, threshold=threshold)
        rows.append(
            {
                "inputs": size,
                "groups": len(found["alone"].values) // size,
                **found["alone"].columns("kl_alone", seed=sample.seed),
                **found["union"].columns("kl_union", seed=sample.seed),
                **found["union"].minus(found["alone"]).columns("added", seed=sample.seed),
                "kl_random_partner": found["random"].mean,
                "worse": float(np.mean(found["union"].values > found["alone"].values)),
            }
        )
    return pd.DataFrame(rows).set_index("inputs")


def aggregation_pairs(sample: Sample, *, threshold: float = 0.0) -> pd.DataFrame:
    """A row a pair of inputs: which rows, and the KL of both outputs alone and under the union."""
    found = aggregation_by_row(sample, 2, threshold=threshold)
    order, alone, union = (found[name].values.reshape(-1, 2) for name in ("order", "alone", "union"))
    columns = {"a": order[:, 0].astype(int), "b": order[:, 1].astype(int)}
    for i, which in enumerate("ab"):
        columns |= {f"kl_alone_{which}": alone[:, i], f"kl_union_{which}": union[:, i]}
    return pd.DataFrame(columns)
