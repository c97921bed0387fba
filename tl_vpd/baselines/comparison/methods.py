"""Artefacts of one method together: the spread over seeds, splitting over sizes, and how alike the seeds are.

    alive_growth   mean alive count over that of the method's smallest size: near 1 unless pieces are split as more are built
    V, U, rank_one mean max cosine of the alive pieces of two artefacts of one size, averaged over modules and pairs, each beside
                   as many random directions (``tl_vpd.evaluation.consistency``)

What it cannot say: with short trainings, artefacts that start alike look alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from tl_vpd.baselines.comparison.replacement import Artefact, directions
from tl_vpd.evaluation.consistency import MEASURES, mean_of_rows, row_of

Alive = Mapping[str, Bool[Tensor, " _"]]
"""Which pieces are alive, by module."""
SPREAD = (
    *("alive", "l0", "per_module", "per_mlp", "parameters", "index_bits", "entropy_bits"),
    *("kl", "clean_input_kl", "single_layer_kl", "mismatch", "ce_increase", "flops", "seconds"),
)
"""Figures of the summary whose mean, smallest and largest value over a method's artefacts of one size are in the table."""


@torch.no_grad()
def by_method(
    summary: pd.DataFrame, alive: Sequence[Alive], artefacts: Mapping[str, Artefact], *, seed: int
) -> pd.DataFrame:
    """A row for each method, threshold and size.

    Args:
        summary: of a comparison.
        alive: pieces of each row of the summary.
        artefacts: by name.
        seed: of the random directions.
    """
    spread = [
        *SPREAD,
        *(c for c in summary.columns.astype(str) if c.startswith("pgd_") and c.rpartition("_")[2].isdigit()),
    ]
    rows = []
    for (method, threshold, built), group in summary.groupby(["method", "threshold", "built"], dropna=False):
        row: dict[str, Any] = {"method": method, "threshold": threshold, "built": built, "artefacts": len(group)}
        for column in spread:
            values = group[column].astype(float)
            row |= {column: values.mean(), f"{column}_low": values.min(), f"{column}_high": values.max()}
        pieces = [(artefacts[name], alive[at]) for at, name in zip(group.index, group["artefact"], strict=True)]
        rows.append(row | consistency_of(pieces, seed=seed))
    table = pd.DataFrame(rows)
    smallest = table.groupby(["method", "threshold"], dropna=False)["alive"].transform("first").clip(lower=1)
    table.insert(table.columns.get_loc("alive_high") + 1, "alive_growth", table["alive"] / smallest)
    return table


def consistency_of(pieces: Sequence[tuple[Artefact, Alive]], *, seed: int) -> dict[str, float]:
    """Mean max cosines of every two artefacts, and their random baselines (NaN where there is one artefact)."""
    pairs = []
    for (one, alive), (other, other_alive) in combinations(pieces, 2):
        rows = []
        for module in (name for name in alive if name in other_alive):
            (V, U), (W, X) = directions(one, module), directions(other, module)
            on, other_on = alive[module].to(V.device), other_alive[module].to(W.device)
            vectors = (V[:, on], U[on], W[:, other_on], X[other_on])
            rows.append({"site": module, **row_of(*(t.double().cpu() for t in vectors), seed=seed)})
        pairs.append(mean_of_rows(rows).loc["mean"])
    names = [f"{name}{end}" for name in MEASURES for end in ("", "_random")]
    return {name: float(sum(p[name] for p in pairs)) / len(pairs) if pairs else float("nan") for name in names}
