"""The tables of a report: those of a sample, which the controls have too, and those of the decomposition as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from torch import Tensor, nn

from tl_vpd.adapters import adapt
from tl_vpd.decomposition import Decomposition
from tl_vpd.evaluation.adversaries import STANDARD, adversaries
from tl_vpd.evaluation.config import EvaluationConfig
from tl_vpd.evaluation.consistency import consistency
from tl_vpd.evaluation.feature_splitting import alive_subcomponents, feature_splitting
from tl_vpd.evaluation.future_leakage import STANDARD_MODES, Leakage, leakage, spread_positions, why_not
from tl_vpd.evaluation.hidden import hidden_errors
from tl_vpd.evaluation.mask_transfer import mask_transfer
from tl_vpd.evaluation.off_distribution import off_distribution, scrambled
from tl_vpd.evaluation.sample import Sample
from tl_vpd.evaluation.sparsity_sweep import THRESHOLDS, sparsity_sweep
from tl_vpd.evaluation.union_test import union_test

CONTROL_THRESHOLDS = (0.0, 0.1, 0.5, 0.9)
"""Thresholds of the controls' sparsity sweeps."""
THESE_ROWS, SCRAMBLED, THIS = "these rows", "scrambled", "this"
"""Names of the report: of its rows, of the same rows scrambled, and of its decomposition."""


def tables_of_sample(
    sample: Sample, config: EvaluationConfig, attacks: Sequence[Mapping[str, Any]], *, learned: bool
) -> dict[str, pd.DataFrame]:
    """The tables of one sample.

    Args:
        sample: the rows.
        config: of the evaluation.
        attacks: rows of the standard adversary, which stand first in the table of adversaries.
        learned: whether it is the decomposition itself, with single sites, all adversaries and the whole sparsity sweep.
    """
    tables: dict[str, pd.DataFrame] = {}
    attacked = [pd.DataFrame(attacks)] if attacks else []
    if learned and config.budgets and config.adversary_budgets and "adversaries" in config.measures:
        kinds = [kind for name, kind in STANDARD.items() if name != "shared"]
        kinds = [kind for kind in kinds if kind.scope != "position" or sample.position_shape]
        attacked.append(adversaries(sample, kinds, budgets=config.adversary_budgets, rows=config.attack_rows))
    if attacked:
        tables["adversaries"] = pd.concat(attacked, ignore_index=True)
    n = len(sample.rows)
    if "union_test" in config.measures and n >= 2:
        tables["union_test"] = union_test(sample, sizes=[size for size in (2, 4) if size <= n])
    if "mask_transfer" in config.measures:
        tables["mask_transfer"] = mask_transfer(sample, single_sites=learned)
    if "hidden" in config.measures:
        tables["hidden"] = hidden_errors(sample)
    if "sparsity_sweep" in config.measures:
        tables["sparsity_sweep"] = sparsity_sweep(sample, thresholds=THRESHOLDS if learned else CONTROL_THRESHOLDS)
    return {name: table if name == "adversaries" else table.reset_index() for name, table in tables.items()}


def leakage_of(sample: Sample, config: EvaluationConfig) -> Leakage | str:
    """Future leakage on the first rows at positions spread over them, or why it cannot be measured."""
    first = sample.first(config.leak_rows)
    return why_not(first) or leakage(
        first, positions=spread_positions(first, config.leak_positions), modes=STANDARD_MODES
    )


def off_distribution_table(
    decomposition: Decomposition, model: nn.Module, tokens: Tensor, config: EvaluationConfig, data: Mapping[str, Any]
) -> pd.DataFrame | str:
    """The rows beside other data, or why there is none.

    Args:
        decomposition: of the model.
        model: the target.
        tokens: the rows.
        config: of the evaluation.
        data: other rows by name.
    """
    if adapt(model).return_types:
        data = {SCRAMBLED: scrambled(model, tokens, seed=config.seed), **data}
    if not data:
        return "no other data was passed"
    return off_distribution(decomposition, model, {THESE_ROWS: tokens, **data}, config).reset_index()


def tables_of_others(
    decomposition: Decomposition,
    model: nn.Module,
    tokens: Tensor,
    config: EvaluationConfig,
    others: Mapping[str, Decomposition],
) -> dict[str, pd.DataFrame]:
    """Feature splitting and consistency with other decompositions of the same model.

    Args:
        decomposition: that is evaluated.
        model: the target.
        tokens: the rows.
        config: of the evaluation.
        others: by name.
    """
    every: dict[str, Decomposition] = {THIS: decomposition, **others}
    splitting = feature_splitting(
        every, model, tokens, batch_size=config.batch_size, seed=config.seed, keep_bytes=config.keep_bytes
    )
    alive = {name: alive_subcomponents(vpd, model, tokens, batch_size=config.batch_size) for name, vpd in every.items()}
    compared = [
        labelled(
            "other",
            name,
            consistency(decomposition, other, alive=(alive[THIS], alive[name]), seed=config.seed).reset_index(),
        )
        for name, other in others.items()
    ]
    return {"feature_splitting": splitting.reset_index(), "consistency": pd.concat(compared, ignore_index=True)}


def labelled(column: str, value: str, table: pd.DataFrame) -> pd.DataFrame:
    """The table with a first column that is the same in every row."""
    table = table.copy()
    table.insert(0, column, value)
    return table


def plain(table: pd.DataFrame) -> list[dict[str, Any]]:
    """A table as JSON: a dict for each row, None for what is missing or not finite."""
    finite = table.replace([float("inf"), float("-inf")], float("nan"))
    return finite.astype(object).where(finite.notna(), None).to_dict("records")  # type: ignore[return-value]
