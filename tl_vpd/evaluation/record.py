"""The flat record of one sample: mode table, L0, alive counts, and the standard adversary's results.

Keys are described in ``docs/evaluation.md``. Numbers are plain Python, so that the record is JSON; a figure that is not defined
becomes None in ``defined``, with a reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from tl_vpd.evaluation.adversaries import Adversary, Attack, attack
from tl_vpd.evaluation.check import NOT_FINITE
from tl_vpd.evaluation.config import EvaluationConfig
from tl_vpd.evaluation.importance_statistics import ALIVE
from tl_vpd.evaluation.intervals import METHOD, PerRow
from tl_vpd.evaluation.modes import ROWS, compute_recovered, masks_in_row
from tl_vpd.evaluation.sample import Sample

NO_NEXT_TOKEN = "no row has two real tokens, one after the other"


def record_of(sample: Sample, config: EvaluationConfig) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The flat record, and the rows that its attacks add to the table of adversaries.

    Args:
        sample: what is measured.
        config: ``budgets``, ``starts`` and ``attack_rows`` of the standard adversary, ``curve``.
    """
    outcomes = sample.outcomes({row: masks_in_row(sample, row) for row in ROWS})
    kl = {row: outcome.distance for row, outcome in outcomes.items()}
    ce = {row: outcome.ce for row, outcome in outcomes.items() if outcome.ce is not None}
    record: dict[str, Any] = {}
    target_ce = sample.target_ce
    above: dict[str, PerRow] = {}
    if target_ce is not None:
        above = {row: values.minus(target_ce) for row, values in ce.items()}
        record["target_ce"] = target_ce.mean
        record |= {f"{row}_ce": values.mean for row, values in ce.items()}
    record |= _counts(sample)
    record["kl"] = {row: values.mean for row, values in kl.items()}
    record["compute_recovered"] = (
        {row: compute_recovered(values.mean, config.curve) for row, values in ce.items()} if config.curve else {}
    )
    attacked = sample.first(config.attack_rows)
    attacks = [attack(attacked, Adversary(steps=steps, starts=config.starts_at(steps))) for steps in config.budgets]
    record |= _attack_figures(attacks, attacked)
    record["intervals"] = {
        "method": METHOD,
        "kl": {row: _bounds(values, sample) for row, values in kl.items()},
        "ce_above_target": {row: _bounds(values, sample) for row, values in above.items()},
        "l0": _bounds(sample.statistics.l0, sample),
        "pgd_kl": {str(a.adversary.steps): bounds_of(a.interval(seed=sample.seed)) for a in attacks},
    }
    record["output"] = sample.distance_name
    shape = sample.statistics
    record["importances"] = {
        "largest": shape.largest,
        "at_1": shape.at_1,
        "tokens_at_1": shape.tokens_at_1,
        "one_row": shape.one_row,
    }
    return record, [a.record(seed=sample.seed) for a in attacks]


def defined(record: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The record with None for every figure that is not a finite number, and the reasons by the figure's name."""
    reasons: dict[str, str] = {}

    def cleaned(value: Any, name: str) -> Any:
        if isinstance(value, Mapping):
            return {key: cleaned(v, f"{name}.{key}" if name else str(key)) for key, v in value.items()}
        if isinstance(value, list):
            return [cleaned(v, name) for v in value]
        if isinstance(value, float) and not math.isfinite(value):
            of_next_token = name.endswith("_ce") or "compute_recovered" in name
            reasons[name] = NO_NEXT_TOKEN if of_next_token and math.isnan(value) else NOT_FINITE
            return None
        return value

    return cleaned(record, ""), reasons


def undefined_columns(tables: Iterable[pd.DataFrame]) -> list[str]:
    """Columns with infinite figures, or with distances that are NaN (intervals and what a row lacks may be)."""
    columns: dict[str, None] = {}
    for table in tables:
        for name in table.select_dtypes("number").columns:
            values = table[name]
            is_distance = name.startswith("kl") and not name.endswith(("_low", "_high"))
            if bool(values.isin([math.inf, -math.inf]).any()) or (is_distance and bool(values.isna().any())):
                columns[name] = None
    return list(columns)


def _attack_figures(attacks: Sequence[Attack], attacked: Sample) -> dict[str, Any]:
    return {
        "pgd_kl": {str(a.adversary.steps): a.kl for a in attacks},
        "pgd_kl_starts": {str(a.adversary.steps): a.losses for a in attacks},
        "pgd_tokens": attacked.n_tokens,
    }


def _bounds(values: PerRow, sample: Sample) -> list[float] | None:
    return bounds_of(values.interval(seed=sample.seed))


def bounds_of(bounds: tuple[float, float]) -> list[float] | None:
    """An interval as JSON has it (None: there is none)."""
    return list(bounds) if all(math.isfinite(bound) for bound in bounds) else None


def _counts(sample: Sample) -> dict[str, Any]:
    site_axis, statistics = sample.site_axis, sample.statistics
    mean, density = (site_axis.split_sites(values) for values in (statistics.mean, statistics.density))
    return {
        "l0": float(statistics.density.sum()),
        "l0_by_site": {name: float(values.sum()) for name, values in density.items()},
        "alive": int(statistics.alive.sum()),
        "alive_1e-4": int((statistics.mean > 1e-4).sum()),
        "alive_by_site": {name: int((values > ALIVE).sum()) for name, values in mean.items()},
        "built": site_axis.total,
        "built_by_site": dict(site_axis.counts),
        "summed_rank": sum(site.rank for site in sample.masked_model.weights.sites.values()),
        "tokens": sample.n_tokens,
        "rows": len(sample.rows),
    }
