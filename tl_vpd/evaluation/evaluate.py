"""``evaluate``: everything this package can ask of a decomposition, on validation tokens, in one report.

    >>> report = evaluate(vpd, model, tokens)               # doctest: +SKIP
    >>> report.warnings                                     # doctest: +SKIP
    >>> report.table()                                      # doctest: +SKIP
    >>> report.save("metrics.json"); report.save_html("report.html")             # doctest: +SKIP

What it cannot say: that a subcomponent *is* a mechanism. It says how well the output survives these maskings on these tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from tl_vpd.adapters import adapt
from tl_vpd.components import Components
from tl_vpd.decomposition import Decomposition
from tl_vpd.evaluation.adversaries import EXPLANATIONS, STANDARD, Adversary, adversaries
from tl_vpd.evaluation.aggregation import aggregation
from tl_vpd.evaluation.cancelling import cancelling_pairs
from tl_vpd.evaluation.consistency import consistency
from tl_vpd.evaluation.controls import (
    random_importances,
    shuffled_importances,
    singular_components,
    singular_importances,
)
from tl_vpd.evaluation.foresight import foresight
from tl_vpd.evaluation.hidden import hidden_errors
from tl_vpd.evaluation.record import record_of
from tl_vpd.evaluation.report import Evaluation
from tl_vpd.evaluation.resolution import THRESHOLDS, resolution
from tl_vpd.evaluation.sample import ALIVE, Importances, Sample, learned
from tl_vpd.evaluation.slices import scrambled, slices
from tl_vpd.evaluation.splitting import alive_of, sizes
from tl_vpd.evaluation.transfer import transfer
from tl_vpd.hooks.tapped import TappedModel
from tl_vpd.site import nearest
from tl_vpd.storage import library_versions

BUDGETS = (20, 40, 80, 160, 320)
MEASURES = (
    "adversaries",
    "aggregation",
    "transfer",
    "hidden",
    "resolution",
    "cancelling",
    "off_distribution",
    "foresight",
)
"""What is measured beside the mode table, the counts and the standard adversary."""
CONTROL_THRESHOLDS = (0.0, 0.1, 0.5, 0.9)
"""Where the controls' curves of resolution are taken."""


@torch.no_grad()
def evaluate(
    decomposition: Decomposition,
    model: nn.Module,
    tokens: Shaped[Tensor, "n ..."],
    *,
    budgets: Sequence[int] = BUDGETS,
    starts: int | Mapping[int, int] = 1,
    controls: bool = True,
    control_budgets: Sequence[int] = (20,),
    batch_size: int = 16,
    seed: int = 0,
    curve: Sequence[Sequence[int | float]] | None = None,
    measures: Sequence[str] = MEASURES,
    adversary_budgets: Sequence[int] = (20, 80),
    attack_rows: int | None = None,
    off_distribution: Mapping[str, Any] | None = None,
    others: Mapping[str, Decomposition] | None = None,
) -> Evaluation:
    """Measures a decomposition on rows of tokens.

    Args:
        tokens: rows ``[n, pos]``; padding is left out. A model of one's own may take other tensors: then distances are squared
            errors and there are no cross-entropies.
        budgets: steps of the standard adversary (each with ``step_size = 2 / steps``); it attacks all rows together with
            sources shared over them, Δ's included (none: no attack of any kind).
        starts: random starts of the standard adversary at each budget, or at some by their steps (the others get one);
            ``pgd_kl`` gives the worst, ``pgd_kl_starts`` all.
        controls: also measure the random, singular and shuffled controls. control_budgets: their adversary's.
        curve: the target's own validation curve of (step, CE), for compute recovered.
        measures: which of ``MEASURES``; each costs passes, most of all ``adversaries`` (four more kinds at each of
            ``adversary_budgets``).
        attack_rows: attack the first rows alone, which costs less (None: all).
        off_distribution: other text and slices by name, as rows of tokens or prompts, set beside ``tokens`` and (where these
            are whole numbers) beside the same tokens ``scrambled`` within rows.
        others: decompositions of the same model from other seeds or with other C, by name.

    Raises:
        ValueError: the tokens, the decomposition or a slice do not fit the model. KeyError: an unknown measure.
    """
    for name in measures:
        if name not in MEASURES:
            raise KeyError(f"{name!r} is no measure{nearest(name, MEASURES)}. Measures: {', '.join(MEASURES)}.")
    tokens = adapt(model).tokens(tokens)
    weights = {name: adapt(model).weight(name) for name in decomposition.sites}
    before = {name: W.clone() for name, W in weights.items()}
    tables: dict[str, list[pd.DataFrame]] = {}

    def measured(pieces: str, parts: Decomposition | Components, importances: Importances) -> dict[str, Any]:
        own = pieces == "learned"
        with TappedModel(parts, model) as tapped:
            sample = Sample(parts, tapped, importances, tokens, batch_size, seed)
            record, attacks = record_of(
                sample,
                budgets=budgets if own else control_budgets,
                starts=starts if own else 1,
                attack_rows=attack_rows,
                curve=curve,
            )
            steps = adversary_budgets if own and budgets and "adversaries" in measures else ()
            for name, table in _tables(sample, measures, attacks, steps, attack_rows, detail=own).items():
                tables.setdefault(name, []).append(_named(pieces, table))
            record["mean_g"] = sample.mean_importances()
            return record

    record = measured("learned", decomposition, learned(decomposition))
    mean_g = record.pop("mean_g")
    if controls:
        record["controls"] = {}
        for name, (parts, importances) in _controls(decomposition, weights, mean_g > ALIVE, seed).items():
            record["controls"][name] = measured(name, parts, importances)
            del record["controls"][name]["mean_g"]
    record["target_params_max_change"] = max(float((adapt(model).weight(n) - W).abs().max()) for n, W in before.items())
    deltas = {name: decomposition.components.delta(name, W) for name, W in weights.items()}
    record["faithfulness"] = {name: float(delta.square().mean()) for name, delta in deltas.items()}
    record["delta_share"] = {
        name: float(delta.square().sum() / weights[name].square().sum().clamp_min(1e-30))
        for name, delta in deltas.items()
    }
    joined = {name: pd.concat(own, ignore_index=True) for name, own in tables.items()}
    whole, left_out = _whole_tables(
        decomposition,
        model,
        tokens,
        measures,
        off_distribution or {},
        others or {},
        min(budgets, default=0),
        attack_rows,
        batch_size,
        seed,
    )
    record["tables"] = {name: _plain(table) for name, table in {**joined, **whole}.items()}
    record["left_out"] = left_out
    record["settings"] = {"seed": seed, "attack_rows": attack_rows, "explanations": EXPLANATIONS}
    record["versions"] = library_versions()
    return Evaluation(record)


def _tables(
    sample: Sample,
    measures: Sequence[str],
    attacks: list[dict[str, Any]],
    steps: Sequence[int],
    attack_rows: int | None,
    *,
    detail: bool,
) -> dict[str, pd.DataFrame]:
    """The tables of one sample, of controls with less detail; attacks that are done already head the table of adversaries."""
    found: dict[str, pd.DataFrame] = {}
    own = [pd.DataFrame(attacks)] if attacks else []
    if steps:
        positions = sample.g[0].ndim > 2
        kinds: list[Adversary] = [
            kind for name, kind in STANDARD.items() if name != "shared" and (positions or name != "position")
        ]
        own.append(adversaries(sample, kinds, budgets=steps, rows=attack_rows))
    if own:
        found["adversaries"] = pd.concat(own, ignore_index=True)
    rows = sum(len(t) for t in sample.tokens)
    if "aggregation" in measures and rows >= 2:
        found["aggregation"] = aggregation(sample, sizes=[n for n in (2, 4) if n <= rows]).reset_index()
    if "transfer" in measures:
        found["transfer"] = transfer(sample, single_sites=detail).reset_index()
    if "hidden" in measures:
        found["hidden"] = hidden_errors(sample).reset_index()
    if "resolution" in measures:
        thresholds = THRESHOLDS if detail else CONTROL_THRESHOLDS
        found["resolution"] = resolution(sample, thresholds=thresholds).reset_index()
    return found


def _controls(
    decomposition: Decomposition, weights: Mapping[str, Tensor], alive: Tensor, seed: int
) -> dict[str, tuple[Decomposition | Components, Importances]]:
    """The controls by name: which pieces, and how they get their importances."""
    packing, own = decomposition.packing, learned(decomposition)
    singular = singular_components(decomposition.sites, weights)

    def at_random(index: int, inputs: Mapping[str, Tensor], keep: Tensor | None) -> Tensor:
        generator = torch.Generator(alive.device).manual_seed(seed * 1_000_003 + index)
        return random_importances(own(index, inputs, keep), alive, packing, generator)

    def by_strength(index: int, inputs: Mapping[str, Tensor], keep: Tensor | None) -> Tensor:
        return singular_importances(own(index, inputs, keep), packing, inputs, singular)

    def at_other_tokens(index: int, inputs: Mapping[str, Tensor], keep: Tensor | None) -> Tensor:
        generator = torch.Generator(alive.device).manual_seed(seed * 1_000_003 + 900_000 + index)
        return shuffled_importances(own(index, inputs, keep), keep, generator)

    return {
        "random": (decomposition, at_random),
        "singular": (singular, by_strength),
        "shuffled": (decomposition, at_other_tokens),
    }


def _whole_tables(
    decomposition: Decomposition,
    model: nn.Module,
    tokens: Tensor,
    measures: Sequence[str],
    off_distribution: Mapping[str, Any],
    others: Mapping[str, Decomposition],
    steps: int,
    attack_rows: int | None,
    batch_size: int,
    seed: int,
) -> tuple[dict[str, pd.DataFrame], dict[str, str]]:
    """Tables of the decomposition as a whole, and why others were left out."""
    found: dict[str, pd.DataFrame] = {}
    left_out: dict[str, str] = {}
    words = adapt(model).return_types
    if len(tokens) < 2:
        left_out["aggregation"] = "there is one row, and a pair needs two"
    if "cancelling" in measures:
        found["cancelling"] = cancelling_pairs(decomposition)
    if "off_distribution" in measures:
        named: dict[str, Any] = {"these rows": tokens}
        if words:
            named["scrambled"] = scrambled(model, tokens, seed=seed)
        if len({**named, **off_distribution}) > 1:
            found["slices"] = slices(
                decomposition,
                model,
                {**named, **off_distribution},
                steps=steps,
                attack_rows=attack_rows,
                batch_size=batch_size,
                seed=seed,
            ).reset_index()
        else:
            left_out["off_distribution"] = "no other data was given"
    if "foresight" in measures:
        if not words:
            left_out["foresight"] = "the model puts out no next-token predictions"
        elif adapt(model).padding(tokens, None) is not None:
            left_out["foresight"] = "some rows are padded"
        elif tokens.shape[1] < 3:
            left_out["foresight"] = "the rows are shorter than three tokens"
        else:
            last = tokens.shape[1] - 2
            positions = sorted({max(1, last * n // 4) for n in (1, 2, 3, 4)})
            found["foresight"] = foresight(
                decomposition, model, tokens[:batch_size], positions=positions, seed=seed
            ).reset_index()
    if others:
        found["sizes"] = sizes(
            dict[str | float, Decomposition]({"this": decomposition}) | dict(others),
            model,
            tokens,
            batch_size=batch_size,
        ).reset_index()
        alive = {name: alive_of(own, model, tokens) for name, own in {"": decomposition, **others}.items()}
        rows = [
            _named(name, consistency(decomposition, own, alive=(alive[""], alive[name]), seed=seed).reset_index())
            for name, own in others.items()
        ]
        found["consistency"] = pd.concat(rows, ignore_index=True).rename(columns={"pieces": "other"})
    return found, left_out


def _named(pieces: str, table: pd.DataFrame) -> pd.DataFrame:
    table = table.copy()
    table.insert(0, "pieces", pieces)
    return table


def _plain(table: pd.DataFrame) -> list[dict[str, Any]]:
    """A table as JSON: a dict a row, None for what is missing."""
    return table.astype(object).where(table.notna(), None).to_dict("records")  # type: ignore[return-value]
