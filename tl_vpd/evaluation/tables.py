"""The tables of a report: those of a sample, which the controls have too, and those of the decomposition as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from jaxtyping import Shaped
from torch import Tensor, nn

from tl_vpd.adapters import adapt
from tl_vpd.decomposition import Decomposition
from tl_vpd.evaluation.adversaries import STANDARD, adversaries
from tl_vpd.evaluation.cancelling import cancelling_pairs
from tl_vpd.evaluation.consistency import consistency
from tl_vpd.evaluation.feature_splitting import alive_of, sizes
from tl_vpd.evaluation.future_leakage import foresight, in_the_way
from tl_vpd.evaluation.hidden import hidden_errors
from tl_vpd.evaluation.mask_transfer import transfer
from tl_vpd.evaluation.off_distribution import scrambled, slices
from tl_vpd.evaluation.sample import Sample
from tl_vpd.evaluation.sparsity_sweep import THRESHOLDS, resolution
from tl_vpd.evaluation.union_test import aggregation

CONTROL_THRESHOLDS = (0.0, 0.1, 0.5, 0.9)
"""Where the controls' curves of resolution are taken."""


@dataclass(frozen=True)
class Scope:
    """What a report measures, and how.

    ``measures``: which tables. ``attack_rows``: how many of the first rows are attacked (None: all). ``slice_steps``: the budget
    of the attack on slices. ``seed``: of all that is drawn.
    """

    measures: Sequence[str]
    attack_rows: int | None
    slice_steps: int
    batch_size: int
    seed: int


def tables_of_sample(
    sample: Sample, scope: Scope, attacks: Sequence[Mapping[str, Any]], steps: Sequence[int], *, detail: bool
) -> dict[str, pd.DataFrame]:
    """The tables of one sample.

    Args:
        attacks: rows of the standard adversary, which head the table of adversaries. steps: budgets of the other kinds.
        detail: single sites and the whole curve of resolution, which controls go without.
    """
    found: dict[str, pd.DataFrame] = {}
    own = [pd.DataFrame(attacks)] if attacks else []
    if steps:
        positions = sample.g[0].ndim > 2
        kinds = [kind for name, kind in STANDARD.items() if name != "shared" and (positions or name != "position")]
        own.append(adversaries(sample, kinds, budgets=steps, rows=scope.attack_rows))
    if own:
        found["adversaries"] = pd.concat(own, ignore_index=True)
    rows = sum(len(t) for t in sample.tokens)
    if "aggregation" in scope.measures and rows >= 2:
        found["aggregation"] = aggregation(sample, sizes=[n for n in (2, 4) if n <= rows]).reset_index()
    if "transfer" in scope.measures:
        found["transfer"] = transfer(sample, single_sites=detail).reset_index()
    if "hidden" in scope.measures:
        found["hidden"] = hidden_errors(sample).reset_index()
    if "resolution" in scope.measures:
        thresholds = THRESHOLDS if detail else CONTROL_THRESHOLDS
        found["resolution"] = resolution(sample, thresholds=thresholds).reset_index()
    return found


def tables_of_decomposition(
    decomposition: Decomposition,
    model: nn.Module,
    tokens: Shaped[Tensor, "n ..."],
    scope: Scope,
    *,
    off_distribution: Mapping[str, Any],
    others: Mapping[str, Decomposition],
) -> tuple[dict[str, pd.DataFrame], dict[str, str]]:
    """The tables of the decomposition as a whole, and by measure why one was left out.

    Raises:
        ValueError: a slice or another decomposition has a name of the report's own.
    """
    found: dict[str, pd.DataFrame] = {}
    left_out: dict[str, str] = {}
    words = adapt(model).return_types
    taken = {"these rows", "scrambled"} & set(off_distribution) | {"this"} & set(others)
    if taken:
        raise ValueError(
            f"The name {', '.join(sorted(taken))} is the report's own: give the slice or decomposition another."
        )
    if "aggregation" in scope.measures and len(tokens) < 2:
        left_out["aggregation"] = "there is one row, and a pair needs two"
    if "cancelling" in scope.measures:
        found["cancelling"] = cancelling_pairs(decomposition)
    if "off_distribution" in scope.measures:
        own = {"scrambled": scrambled(model, tokens, seed=scope.seed)} if words else {}
        if own or off_distribution:
            found["slices"] = slices(
                decomposition,
                model,
                {"these rows": tokens, **own, **off_distribution},
                steps=scope.slice_steps,
                attack_rows=scope.attack_rows,
                batch_size=scope.batch_size,
                seed=scope.seed,
            ).reset_index()
        else:
            left_out["slices"] = "no other data was given"
    if "foresight" in scope.measures:
        why = _no_foresight(decomposition, model, tokens)
        if why:
            left_out["foresight"] = why
        else:
            last = tokens.shape[1] - 2
            positions = sorted({max(1, last * n // 4) for n in (1, 2, 3, 4)})
            rows = tokens[: scope.batch_size]
            found["foresight"] = foresight(
                decomposition, model, rows, positions=positions, seed=scope.seed
            ).reset_index()
    if others:
        both: dict[str, Decomposition] = {"this": decomposition, **others}
        found["sizes"] = sizes(both, model, tokens, batch_size=scope.batch_size).reset_index()
        alive = {name: alive_of(own, model, tokens, batch_size=scope.batch_size) for name, own in both.items()}
        compared = [
            named(
                "other",
                name,
                consistency(decomposition, own, alive=(alive["this"], alive[name]), seed=scope.seed).reset_index(),
            )
            for name, own in others.items()
        ]
        found["consistency"] = pd.concat(compared, ignore_index=True)
    return found, left_out


def _no_foresight(decomposition: Decomposition, model: nn.Module, tokens: Shaped[Tensor, "n ..."]) -> str:
    """Why Γ cannot be given prefixes alone (empty: it can)."""
    if not adapt(model).return_types:
        return "the model puts out no next-token predictions"
    if adapt(model).padding(tokens, None) is not None:
        return "some rows are padded"
    if tokens.shape[1] < 3:
        return "the rows are shorter than three tokens"
    return in_the_way(decomposition, model)


def named(column: str, value: str, table: pd.DataFrame) -> pd.DataFrame:
    """The table with a first column that is the same in every row."""
    table = table.copy()
    table.insert(0, column, value)
    return table


def plain(table: pd.DataFrame) -> list[dict[str, Any]]:
    """A table as JSON: a dict a row, None for what is missing."""
    return table.astype(object).where(table.notna(), None).to_dict("records")  # type: ignore[return-value]
