"""Consistency: do two decompositions of one model (other seeds, other C) give the same subcomponents?

For every subcomponent of one the largest similarity to any of the other, averaged over subcomponents and over both directions
(VPD paper, consistency across seeds):

    cos_V = max_c' |cos(V_c, V'_c')|,    cos_U likewise,    cos_rank-one = max_c' cos(V_c, V'_c') · cos(U_c, U'_c')

The signs of V and U are arbitrary one by one, the sign of their product is not. ``split`` is the splitting share: how many of the
first's subcomponents have more than one match in the other, that is |cos(U_c, U'_c')| > 0.5 (VPD paper, appendix on feature
splitting: 2.7% of half of C in four times C). The baseline replaces the other's subcomponents
by as many random ones (normal directions of V and U): in few dimensions chance alone is high.

    >>> consistency(vpd_0, vpd_1)                              # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from tl_vpd.checks import seed_of, shown
from tl_vpd.decomposition import Decomposition

MEASURES = ("V", "U", "rank_one")
MATCH = 0.5
"""Cosine of write directions above which two subcomponents match."""
BASELINES = 5
"""Random baselines per site."""

Alive = Mapping[str, Bool[Tensor, " _"]]
"""Which subcomponents are alive, by site."""


def max_cosines(
    V: Float[Tensor, "d_in C"],
    U: Float[Tensor, "C d_out"],
    other_V: Float[Tensor, "d_in K"],
    other_U: Float[Tensor, "K d_out"],
) -> dict[str, Float[Tensor, " C"]]:
    """Every subcomponent's largest similarity to any of the other's, by V, by U and by the rank-one matrix."""
    in_V = F.normalize(V, dim=0).T @ F.normalize(other_V, dim=0)
    in_U = F.normalize(U, dim=1) @ F.normalize(other_U, dim=1).T
    products = in_V * in_U
    return {
        "V": in_V.abs().max(-1).values,
        "U": in_U.abs().max(-1).values,
        "rank_one": products.max(-1).values,
    }


def split_share(U: Float[Tensor, "C d_out"], other_U: Float[Tensor, "K d_out"]) -> float:
    """The share of subcomponents that match more than one of the other's by their write direction (NaN: there are none)."""
    matches = (F.normalize(U, dim=1) @ F.normalize(other_U, dim=1).T).abs() > MATCH
    return float((matches.sum(1) > 1).double().mean())


@torch.no_grad()
def consistency(
    one: Decomposition, other: Decomposition, *, alive: tuple[Alive, Alive] | None = None, seed: int = 0
) -> pd.DataFrame:
    """A row for each site, and their mean: mean max cosine of V, U and rank-one, and the share of ``one`` that is ``split`` in
    ``other``, each next to its random baseline.

    A site of which no subcomponent is alive in one of the two has no cosines (NaN), and is left out of the mean.

    Args:
        one: a decomposition.
        other: of the same model.
        alive: which subcomponents of each to compare (None: all; see ``alive_subcomponents``).
        seed: of the random baselines.

    Raises:
        ValueError: the two do not decompose the same sites, or ``alive`` does not fit them.
        TypeError: an argument is of another type.
    """
    seed = seed_of(seed)
    check_same_sites(one, other)
    if alive is not None and (not isinstance(alive, tuple | list) or len(alive) != 2):
        raise TypeError(f"alive={shown(alive)}: give a pair of tensors of bools by site.")
    for bounds, of in zip(alive or (), (one, other), strict=False):
        if not isinstance(bounds, Mapping):
            raise TypeError(f"alive has a {type(bounds).__name__}: give a pair of tensors of bools by site.")
        shapes = {name: tuple(bounds[name].shape) if name in bounds else None for name in of.sites}
        if shapes != {name: (of.counts[name],) for name in of.sites}:
            raise ValueError(f"alive has the shapes {shapes}: give True or False for each subcomponent of every site.")
    rows = []
    for name in one.sites:
        V, U = _vectors(one, name, None if alive is None else alive[0])
        other_V, other_U = _vectors(other, name, None if alive is None else alive[1])
        rows.append({"site": name, **row_of(V, U, other_V, other_U, seed=seed)})
    return mean_of_rows(rows)


def row_of(
    V: Float[Tensor, "d_in C"],
    U: Float[Tensor, "C d_out"],
    other_V: Float[Tensor, "d_in K"],
    other_U: Float[Tensor, "K d_out"],
    *,
    seed: int,
) -> dict[str, float | int]:
    """A row of the table: both counts, every mean max cosine and the splitting share next to their random baselines."""
    figures, generator = _figures(V, U, other_V, other_U), torch.Generator().manual_seed(seed)
    chance = [_figures(V, U, _like(other_V, generator), _like(other_U, generator)) for _ in range(BASELINES)]
    row: dict[str, float | int] = {"C": V.shape[1], "C_other": other_V.shape[1]}
    for name in (*MEASURES, "split"):
        row[name] = figures[name]
        row[f"{name}_random"] = sum(c[name] for c in chance) / BASELINES
    return row


def mean_of_rows(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The table of these rows, with their mean as the last."""
    table = pd.DataFrame(rows).set_index("site")
    columns = [c for c in table.columns if not c.startswith("C")]
    mean = table[columns].mean().to_frame("mean").T
    mean["C"], mean["C_other"] = int(table["C"].sum()), int(table["C_other"].sum())
    return pd.concat([table, mean[table.columns]]).rename_axis("site")


def _vectors(decomposition: Decomposition, name: str, alive: Alive | None) -> tuple[Tensor, Tensor]:
    """V and U of a site's (alive) subcomponents, in float64."""
    V, U = (t[name].detach().double().cpu() for t in (decomposition.V, decomposition.U))
    return (V, U) if alive is None else (V[:, alive[name].cpu()], U[alive[name].cpu()])


def _figures(V: Tensor, U: Tensor, other_V: Tensor, other_U: Tensor) -> dict[str, float]:
    if not (V.shape[1] and other_V.shape[1]):
        return dict.fromkeys((*MEASURES, "split"), float("nan"))
    there, back = max_cosines(V, U, other_V, other_U), max_cosines(other_V, other_U, V, U)
    both_ways = {name: float(there[name].mean() + back[name].mean()) / 2 for name in MEASURES}
    return {**both_ways, "split": split_share(U, other_U)}


def _like(t: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(t.shape, generator=generator, dtype=t.dtype)


def check_same_sites(one: Decomposition, other: Decomposition) -> None:
    """Raises ValueError where two decompositions are of other sites or shapes, TypeError for other things."""
    for vpd in (one, other):
        if not isinstance(vpd, Decomposition):
            raise TypeError(f"A {type(vpd).__name__} came for a Decomposition.")
    shapes, other_shapes = ({s: (x.d_in, x.d_out) for s, x in vpd.sites.items()} for vpd in (one, other))
    if shapes != other_shapes:
        different = sorted(set(one.sites) ^ set(other.sites))
        what = f"only one has {', '.join(different)}" if different else "their sites have other shapes"
        raise ValueError(f"These are not decompositions of the same weights: {what}.")
