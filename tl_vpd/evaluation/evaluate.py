"""``evaluate``: everything this package can ask of a decomposition, on validation tokens, in one report.

    >>> report = evaluate(vpd, model, tokens)               # doctest: +SKIP
    >>> report.warnings                                     # doctest: +SKIP
    >>> report.table()                                      # doctest: +SKIP
    >>> report.save("metrics.json")                            # doctest: +SKIP

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
from tl_vpd.components.storage import library_versions
from tl_vpd.decomposition import Decomposition
from tl_vpd.evaluation.adversaries import EXPLANATIONS
from tl_vpd.evaluation.consistency import check_same_sites
from tl_vpd.evaluation.controls import controls_of
from tl_vpd.evaluation.record import record_of
from tl_vpd.evaluation.report import Evaluation
from tl_vpd.evaluation.sample import ALIVE, Importances, Sample, learned
from tl_vpd.evaluation.tables import Scope, named, plain, tables_of_decomposition, tables_of_sample
from tl_vpd.forward.masked_model import MaskedModel
from tl_vpd.site import nearest

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


@torch.inference_mode(False)
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
            sources shared over them, Δ's included (none: none on the decomposition; controls have ``control_budgets``).
        starts: random starts of the standard adversary at each budget, or at some by their steps (the others get one);
            ``pgd_kl`` gives the worst, ``pgd_kl_starts`` all.
        controls: also measure the random, singular and shuffled controls. control_budgets: their adversary's.
        curve: the target's own validation curve of (step, CE), for compute recovered.
        measures: which of ``MEASURES``; each costs passes, most of all ``adversaries`` (four more kinds at each of
            ``adversary_budgets``).
        attack_rows: attack the first rows alone, which costs less (None: all).
        off_distribution: other text and slices by name, as rows of tokens or prompts, set beside ``tokens`` and (of
            TransformerLens's transformers) beside the same tokens ``scrambled`` within rows.
        others: decompositions of the same model from other seeds or with other C, by name.

    Raises:
        ValueError: the tokens, the decomposition or a slice do not fit the model. KeyError: an unknown measure.
    """
    for name in measures:
        if name not in MEASURES:
            raise KeyError(f"{name!r} is no measure{nearest(name, MEASURES)}. Measures: {', '.join(MEASURES)}.")
    tokens = adapt(model).tokens(tokens)
    _check_beside(decomposition, model, off_distribution or {}, others or {})
    weights = {name: adapt(model).weight(name) for name in decomposition.sites}
    before = {name: W.clone() for name, W in weights.items()}
    scope = Scope(measures, attack_rows, min(budgets, default=0), batch_size, seed)
    tables: dict[str, list[pd.DataFrame]] = {}

    def measured(pieces: str, parts: Decomposition | Components, importances: Importances) -> dict[str, Any]:
        own = pieces == "learned"
        with MaskedModel(parts, model) as masked_model:
            sample = Sample(parts, masked_model, importances, tokens, batch_size, seed)
            record, attacks = record_of(
                sample,
                budgets=budgets if own else control_budgets,
                starts=starts if own else 1,
                attack_rows=attack_rows,
                curve=curve,
            )
            steps = adversary_budgets if own and budgets and "adversaries" in measures else ()
            for name, table in tables_of_sample(sample, scope, attacks, steps, detail=own).items():
                tables.setdefault(name, []).append(named("pieces", pieces, table))
            record["mean_g"] = sample.mean_importances()
            return record

    record = measured("learned", decomposition, learned(decomposition))
    mean_g = record.pop("mean_g")
    if controls:
        record["controls"] = {}
        for name, (parts, importances) in controls_of(decomposition, weights, mean_g > ALIVE, seed).items():
            record["controls"][name] = measured(name, parts, importances)
            del record["controls"][name]["mean_g"]
    record["target_params_max_change"] = max(float((adapt(model).weight(n) - W).abs().max()) for n, W in before.items())
    deltas = {name: decomposition.components.delta(name, W.to(decomposition.device)) for name, W in weights.items()}
    record["faithfulness"] = {name: float(delta.square().mean()) for name, delta in deltas.items()}
    record["delta_share"] = {
        name: float(delta.square().sum()) / max(float(weights[name].square().sum()), 1e-30)
        for name, delta in deltas.items()
    }
    joined = {name: pd.concat(own, ignore_index=True) for name, own in tables.items()}
    whole, left_out = tables_of_decomposition(
        decomposition, model, tokens, scope, off_distribution=off_distribution or {}, others=others or {}
    )
    record["tables"] = {name: plain(table) for name, table in {**joined, **whole}.items()}
    record["left_out"] = left_out
    record["settings"] = {"seed": seed, "attack_rows": attack_rows, "explanations": EXPLANATIONS}
    record["versions"] = library_versions()
    return Evaluation(record)


def _check_beside(
    decomposition: Decomposition, model: nn.Module, slices: Mapping[str, Any], others: Mapping[str, Decomposition]
) -> None:
    """Refuses what is to be set beside before anything is measured."""
    for name, other in others.items():
        try:
            check_same_sites(decomposition, other)
        except ValueError as error:
            raise ValueError(f"Decomposition {name!r}: {error}") from error
    for name, rows in slices.items():
        try:
            adapt(model).tokens(rows)
        except (ValueError, TypeError) as error:
            raise type(error)(f"Slice {name!r}: {error}") from error
