"""``evaluate``: every measure of this package on validation tokens, in one report.

    >>> report = evaluate(vpd, model, tokens)               # doctest: +SKIP
    >>> report.warnings                                     # doctest: +SKIP
    >>> report.table()                                      # doctest: +SKIP
    >>> report.save("metrics.json")                         # doctest: +SKIP

What it cannot say: that a subcomponent *is* a mechanism. It says how well the output survives these maskings on these tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from tl_vpd.adapters import adapt
from tl_vpd.checks import config_of, instance
from tl_vpd.decomposition import Decomposition
from tl_vpd.evaluation.adversaries import EXPLANATIONS
from tl_vpd.evaluation.batch import BatchStore
from tl_vpd.evaluation.cancelling import cancelling_pairs
from tl_vpd.evaluation.check import NOT_FINITE
from tl_vpd.evaluation.config import EvaluationConfig
from tl_vpd.evaluation.consistency import check_same_sites
from tl_vpd.evaluation.controls import controls_of
from tl_vpd.evaluation.future_leakage import Leakage
from tl_vpd.evaluation.nontarget import WHY_NOT, nontarget
from tl_vpd.evaluation.nulls import Null, check_nulls, nulls_table
from tl_vpd.evaluation.off_distribution import check_by_name
from tl_vpd.evaluation.record import bounds_of, defined, record_of, undefined_columns
from tl_vpd.evaluation.report import Evaluation
from tl_vpd.evaluation.sample import Sample, sampled
from tl_vpd.evaluation.tables import (
    SCRAMBLED,
    THESE_ROWS,
    THIS,
    labelled,
    leakage_of,
    off_distribution_table,
    plain,
    tables_of_others,
    tables_of_sample,
)
from tl_vpd.files.versions import library_versions
from tl_vpd.forward.masked_model import MaskedModel


@torch.inference_mode(False)
@torch.no_grad()
def evaluate(
    decomposition: Decomposition,
    model: nn.Module,
    tokens: Shaped[Tensor, "n ..."],
    config: EvaluationConfig | None = None,
    *,
    off_distribution: Mapping[str, Any] | None = None,
    others: Mapping[str, Decomposition] | None = None,
    nulls: Mapping[str, Null] | None = None,
) -> Evaluation:
    """Measures a decomposition on rows of tokens. Figures do not depend on the batch size or the memory that may be used.

    Args:
        decomposition: of the model.
        model: the target; its weights, hooks and flags are afterwards as they were.
        tokens: rows ``[n, pos]``; padding is left out. A custom model may take other tensors: then distances are squared
            errors and there are no cross-entropies.
        config: what is measured, and at what cost (None: ``EvaluationConfig()``).
        off_distribution: other data by name, as rows of tokens or prompts, compared with ``tokens`` and (for language models)
            with the same tokens ``scrambled`` within rows. Of a targeted decomposition, whose target are the ``tokens``, they are
            measured with Δ on (``nontarget``), and what takes Δ for an error is left out, saying so.
        others: decompositions of the same model from other seeds or with other C, by name.
        nulls: by name, other models with their decompositions, which should look worse: see ``decompose_shuffled``.

    Raises:
        ValueError: the tokens, the decomposition, other data, another decomposition or a null do not fit.
        TypeError: an argument is of another type.

    Figures that are NaN or infinite are None in the record; ``left_out`` names them, and ``warnings`` too.
    """
    config = config_of(EvaluationConfig, config)
    instance("decomposition", decomposition, Decomposition)
    data = {} if off_distribution is None else off_distribution
    others, nulls = {} if others is None else others, {} if nulls is None else nulls
    tokens = adapt(model).tokens(tokens)
    targeted = "targeted" in decomposition.record
    _check_beside(decomposition, model, data, others)
    check_nulls(nulls, tokens)
    options: dict[str, Any] = {
        "batch_size": config.batch_size,
        "seed": config.seed,
        "keep_bytes": config.keep_bytes,
    }
    with sampled(decomposition, model, tokens, **options) as sample:
        weights = {name: adapt(model).weight(name) for name in decomposition.sites}
        before = {name: W.clone() for name, W in weights.items()}
        report = _Report(config, padding=len(tokens) - len(sample.rows))
        report.add_sample(sample)
        if "future_leakage" in config.measures:
            report.add_leakage(leakage_of(sample, config), seed=config.seed)
        if nulls:
            report.add_table("nulls", nulls_table(sample, nulls, tokens, this=THIS).reset_index())
        sample.store.clear()
        if config.controls:
            report.add_controls(decomposition, sample, weights)
    if "cancelling" in config.measures:
        report.add_table("cancelling", cancelling_pairs(decomposition))
    if "off_distribution" in config.measures:
        if targeted:
            elsewhere: Any = (
                nontarget(decomposition, model, data, config).reset_index() if data else "no other data was passed"
            )
            report.add_table("off_distribution", f"{WHY_NOT}, so other data are in the table nontarget")
            report.add_table("nontarget", elsewhere)
        else:
            table = off_distribution_table(decomposition, model, tokens, config, data)
            report.add_table("off_distribution", table)
    if others:
        for name, table in tables_of_others(decomposition, model, tokens, config, others).items():
            report.add_table(name, table)
    report.add_weights(decomposition, model, before, targeted=targeted)
    return report.finished()


class _Report:
    """The record of an evaluation while it is made.

    Args:
        config: of the evaluation.
        padding: the number of rows that are left out since they are padding only.
    """

    def __init__(self, config: EvaluationConfig, *, padding: int) -> None:
        self.config = config
        self.record: dict[str, Any] = {}
        self.tables: dict[str, list[pd.DataFrame]] = {}
        self.left_out: dict[str, str] = {}
        if padding:
            self.left_out["rows"] = f"{padding} of them are padding only"

    def add_sample(self, sample: Sample) -> None:
        """The decomposition itself."""
        self.record = self._measured(sample, "learned", self.config.budgets)
        if "union_test" in self.config.measures and len(sample.rows) < 2:
            self.left_out["union_test"] = "there is one row, and a pair needs two"

    def add_controls(self, decomposition: Decomposition, sample: Sample, weights: Mapping[str, Tensor]) -> None:
        """The controls, one after the other."""
        self.record["controls"] = {}
        for name, (components, importances) in controls_of(decomposition, sample, weights).items():
            masked_model, store = sample.masked_model, BatchStore(self.config.keep_bytes)
            if components is not decomposition:
                masked_model = MaskedModel(components, masked_model.model)
            control = replace(sample, masked_model=masked_model, importances=importances, store=store)
            self.record["controls"][name] = self._measured(control, name, self.config.control_budgets)

    def add_leakage(self, result: Leakage | str, *, seed: int) -> None:
        """Future leakage by mode and position, or the reason why there is none."""
        if isinstance(result, Leakage):
            leaks = {mode: result.leak(mode) for mode in result.figures}
            self.record["leak"] = {mode: leak.mean for mode, leak in leaks.items()}
            self.record["intervals"]["leak"] = {
                mode: bounds_of(leak.interval(seed=seed)) for mode, leak in leaks.items()
            }
            self.record["leak_tokens"] = int(leaks[next(iter(leaks))].tokens.sum())
            self.record["importance_change"] = float(np.nanmax(result.importance_change))
        self.add_table(
            "future_leakage", result if isinstance(result, str) else result.to_pandas(seed=seed).reset_index()
        )

    def add_table(self, name: str, table: pd.DataFrame | str) -> None:
        """A table, or the reason why there is none."""
        if isinstance(table, str):
            self.left_out[name] = table
        else:
            self.tables.setdefault(name, []).append(table)

    def add_weights(
        self,
        decomposition: Decomposition,
        model: nn.Module,
        before: Mapping[str, Float[Tensor, "_ _"]],
        *,
        targeted: bool,
    ) -> None:
        """The faithfulness of each site (unless Δ is left over by design), and whether the target is unchanged."""
        changes, squares, shares = [0.0], {}, {}
        for name, W in before.items():
            changes.append(float((adapt(model).weight(name) - W).abs().max()))
            delta = decomposition.components.delta(name, W.to(decomposition.device)).square()
            squares[name] = float(delta.mean())
            shares[name] = float(delta.sum()) / max(float(W.square().sum()), 1e-30)
        self.record["target_params_max_change"] = max(changes)
        for name, values in (("faithfulness", squares), ("delta_share", shares)):
            if targeted:
                self.left_out[name] = WHY_NOT
            else:
                self.record[name] = values

    def finished(self) -> Evaluation:
        """The evaluation."""
        tables = {name: plain(pd.concat(of_pieces, ignore_index=True)) for name, of_pieces in self.tables.items()}
        config = self.config
        settings = {"seed": config.seed, "attack_rows": config.attack_rows, "explanations": EXPLANATIONS}
        record, reasons = defined(self.record)
        for name, of_pieces in self.tables.items():
            reasons |= {f"tables.{name}.{column}": NOT_FINITE for column in undefined_columns(of_pieces)}
        left_out = {**self.left_out, **reasons}
        whole = {"tables": tables, "left_out": left_out, "settings": settings, "versions": library_versions()}
        return Evaluation({**record, **whole})

    def _measured(self, sample: Sample, pieces: str, budgets: Sequence[int]) -> dict[str, Any]:
        learned = pieces == "learned"
        config = self.config if learned else replace(self.config, budgets=budgets, starts=1)
        record, attacks = record_of(sample, config)
        for name, table in tables_of_sample(sample, config, attacks, learned=learned).items():
            self.add_table(name, labelled("pieces", pieces, table))
        return record


def _check_beside(
    decomposition: Decomposition, model: nn.Module, data: Mapping[str, Any], others: Mapping[str, Decomposition]
) -> None:
    """Refuses other data and decompositions that do not fit, before anything is measured."""
    check_by_name("off_distribution", data, "rows of tokens")
    check_by_name("others", others, "decompositions")
    reserved = {THESE_ROWS, SCRAMBLED} & set(data) | {THIS} & set(others)
    if reserved:
        raise ValueError(f"The report itself uses the name {', '.join(sorted(reserved))}: choose another name.")
    for name, other in others.items():
        try:
            check_same_sites(decomposition, other)
        except ValueError as error:
            raise ValueError(f"Decomposition {name!r}: {error}") from error
    for name, rows in data.items():
        try:
            adapt(model).tokens(rows)
        except (ValueError, TypeError) as error:
            raise type(error)(f"Data {name!r}: {error}") from error
