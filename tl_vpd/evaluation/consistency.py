"""Consistency: do two decompositions of one model (other seeds, other C) find the same subcomponents?

For every subcomponent of one the largest similarity to any of the other, averaged over subcomponents and over both directions:

    cos_V = max_c' |cos(V_c, V'_c')|,    cos_U likewise,    cos_rank-one = max_c' cos(V_c, V'_c') · cos(U_c, U'_c')

The sign of V and U apart is arbitrary, that of their product is not. The baseline replaces the other's subcomponents by as
many random ones (normal directions of V and U): in few dimensions chance alone is high.

    >>> consistency(vpd_0, vpd_1)                              # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from tl_vpd.decomposition import Decomposition

MEASURES = ("V", "U", "rank_one")
DRAWS = 5
"""Random baselines drawn a site."""


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


@torch.no_grad()
def consistency(
    one: Decomposition,
    two: Decomposition,
    *,
    alive: tuple[Mapping[str, Bool[Tensor, " _"]], Mapping[str, Bool[Tensor, " _"]]] | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """A row a site, and their mean: mean max cosine of V, U and rank-one, each beside its random baseline.

    A site of which nothing lives in one of the two has no cosines (NaN), and is left out of the mean.

    Args:
        alive: which subcomponents of each to compare, by site (None: all; ``alive_of`` finds them).

    Raises:
        ValueError: the two do not decompose the same sites.
    """
    check_same_sites(one, two)
    rows = []
    for name in one.sites:
        parts = []
        for side, own in enumerate((one, two)):
            V, U = own.V[name].detach().double().cpu(), own.U[name].detach().double().cpu()
            if alive is not None:
                kept = alive[side][name].cpu()
                V, U = V[:, kept], U[kept]
            parts.append((V, U))
        (V, U), (other_V, other_U) = parts
        found = _both_ways(V, U, other_V, other_U)
        generator = torch.Generator().manual_seed(seed)
        chance = [_both_ways(V, U, _like(other_V, generator), _like(other_U, generator)) for _ in range(DRAWS)]
        row: dict[str, float | str | int] = {"site": name, "C": V.shape[1], "C_other": other_V.shape[1]}
        for measure in MEASURES:
            row[measure] = found[measure]
            row[f"{measure}_random"] = sum(c[measure] for c in chance) / DRAWS
        rows.append(row)
    table = pd.DataFrame(rows).set_index("site")
    columns = [c for c in table.columns if not c.startswith("C")]
    mean = table[columns].mean().to_frame("mean").T
    mean["C"], mean["C_other"] = int(table["C"].sum()), int(table["C_other"].sum())
    return pd.concat([table, mean[table.columns]]).rename_axis("site")


def _both_ways(V: Tensor, U: Tensor, other_V: Tensor, other_U: Tensor) -> dict[str, float]:
    if not (V.shape[1] and other_V.shape[1]):
        return dict.fromkeys(MEASURES, float("nan"))
    there, back = max_cosines(V, U, other_V, other_U), max_cosines(other_V, other_U, V, U)
    return {name: float(there[name].mean() + back[name].mean()) / 2 for name in MEASURES}


def _like(t: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(t.shape, generator=generator, dtype=t.dtype)


def check_same_sites(one: Decomposition, two: Decomposition) -> None:
    """Raises ValueError where two decompositions are of other sites or shapes."""
    if {s: (x.d_in, x.d_out) for s, x in one.sites.items()} != {s: (x.d_in, x.d_out) for s, x in two.sites.items()}:
        lacking = sorted(set(one.sites) ^ set(two.sites))
        what = f"{', '.join(lacking)} stand in one alone" if lacking else "their sites have other shapes"
        raise ValueError(f"These are no decompositions of the same weights: {what}.")
