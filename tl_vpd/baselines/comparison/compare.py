"""``compare``: decompositions, transcoders and SAEs of one model on the same axes, in one table with intervals.

Each artefact takes the place of the same MLPs, in three ways (VPD paper, "End-to-end transcoders"): *error-propagating* (each
reads the residual stream as the ones before it left it), *clean-input* (each reads the target's) and *single-layer* (one at a
time). Artefacts that were trained in one way and fall apart in another make up for each other's errors.

    >>> comparison = compare(model, tokens, {"vpd": vpd, "plt": plt, "clt": clt})            # doctest: +SKIP
    >>> comparison.to_pandas()                                                               # doctest: +SKIP

Columns of the summary, per token and from the target's own pass:

    l0             active pieces: subcomponents with g > threshold, latents above their thresholds
    per_module     l0 / modules (weight matrices; layers of latents)
    per_mlp        active pieces that take part in an MLP's output, averaged over MLPs (a cross-layer latent counts in each)
    parameters     numbers in active pieces (d_in + d_out; cross-layer: d_in + targets · d_out), with skip connections
    alive, dead    active at one or more of these tokens, or at none
    trained_in     the way of replacing that the artefact was trained in ("local": on each MLP's output)
    mismatch       the largest KL in another way over the KL in that one
    index_bits     l0 · log₂(alive): to name the active pieces, with equal lengths (clustering cost of the paper at α = 0)
    entropy_bits   Σ_c H₂(f_c), f_c how often piece c is active: the same with a code that knows the frequencies
    pgd_{steps}    KL when a shared adversary switches inactive pieces on (``Replacement.attacked``); errors propagate

What it cannot say: that what is active is a mechanism. Interpretability is not measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from tl_vpd.adapters import Adapter, adapt
from tl_vpd.baselines.comparison.config import ComparisonConfig, TrainingCost
from tl_vpd.baselines.comparison.measured import Measured
from tl_vpd.baselines.comparison.methods import by_method
from tl_vpd.baselines.comparison.replacement import Artefact, layers_of, mlp_sites, replacement_of
from tl_vpd.baselines.comparison.result import Comparison
from tl_vpd.baselines.transcoders.replaced_model import ReplacedModel
from tl_vpd.baselines.transcoders.transcoders import Transcoders
from tl_vpd.checks import config_of, instance, shown, text_of
from tl_vpd.decomposition import Decomposition
from tl_vpd.evaluation.batch import Batch, Rows, ce_by_row
from tl_vpd.evaluation.intervals import PerRow
from tl_vpd.evaluation.sample import all_rows
from tl_vpd.losses import Reconstruction


@torch.inference_mode(False)
@torch.no_grad()
def compare(
    model: nn.Module,
    tokens: Any,
    artefacts: Mapping[str, Artefact],
    config: ComparisonConfig | None = None,
    *,
    costs: Mapping[str, TrainingCost] | None = None,
    methods: Mapping[str, str] | None = None,
) -> Comparison:
    """Measures artefacts of one model on rows of tokens.

    Args:
        model: the target, a language model; its weights, hooks and flags are afterwards as they were.
        tokens: rows ``[n, pos]``, or prompts; padding is left out.
        artefacts: decompositions and transcoders by name. All must replace the MLPs of the same layers; of a decomposition, the
            MLPs' matrices alone are masked.
        config: what is measured (None: ``ComparisonConfig()``).
        costs: of artefacts by name (transcoders that were trained here have theirs in their record).
        methods: the method of artefacts by name, such as ``{"plt 0": "plt", "plt 1": "plt"}``: those of one method differ in
            seed and size alone (None, and for artefacts that it leaves out: the kind, and what transcoders were trained in).

    Raises:
        KeyError: ``costs`` or ``methods`` names something else.
        TypeError: an argument is of another type.
        ValueError: there are no artefacts, they replace other layers, a decomposition lacks a matrix of an MLP, or one does not
            fit the model.
    """
    config = config_of(ComparisonConfig, config)
    if not isinstance(artefacts, Mapping) or not artefacts:
        raise ValueError(f"artefacts={shown(artefacts)}: give at least one by name.")
    for name, artefact in artefacts.items():
        text_of("A name in artefacts", name)
        instance(f"artefacts[{shown(name)}]", artefact, Decomposition, Transcoders)
    costs, methods = (_by_name(what, values, artefacts) for what, values in (("costs", costs), ("methods", methods)))
    for name, cost in costs.items():
        instance(f"costs[{shown(name)}]", cost, TrainingCost)
    for name, method in methods.items():
        text_of(f"methods[{shown(name)}]", method)
    layers, adapter = _same_layers(artefacts), adapt(model)
    _check_whole_mlps(adapter, artefacts)
    rows = all_rows(adapter, tokens)
    tables: dict[str, list[dict[str, Any]]] = {"summary": [], "replacement": [], "modules": [], "attacks": []}
    alive: list[dict[str, Tensor]] = []
    target, zero, n_tokens = _zero(model, rows, layers, config)
    for name, artefact in artefacts.items():
        for threshold in config.thresholds if isinstance(artefact, Decomposition) else (float("nan"),):
            options: dict[str, Any] = {"batch_size": config.batch_size, "seed": config.seed}
            with replacement_of(artefact, model, rows, threshold, **options) as replacement:
                measured = Measured(replacement, rows, target, config)
                label = {"artefact": name, "threshold": threshold}
                tables["replacement"] += [label | row for row in measured.replacement]
                tables["modules"] += [label | row for row in measured.modules()]
                tables["attacks"] += [label | row for row in measured.attacks]
                method = {"method": methods.get(name, replacement.method)}
                tables["summary"].append(label | method | measured.summary() | _cost(artefact, costs.get(name)))
                alive.append(measured.alive)
    frames = {name: pd.DataFrame(rows_of) for name, rows_of in tables.items()}
    frames["methods"] = by_method(frames["summary"], alive, artefacts, seed=config.seed)
    return Comparison(frames, target.mean, zero, n_tokens, tuple(layers))


def _by_name(what: str, values: Any, artefacts: Mapping[str, Artefact]) -> dict[str, Any]:
    """Values of artefacts by name (None: there are none)."""
    if values is not None and not isinstance(values, Mapping):
        raise TypeError(f"{what}={shown(values)} is a {type(values).__name__}: give a mapping by artefacts' names.")
    for name in values or ():
        if name not in artefacts:
            raise KeyError(f"{what} names {shown(name)}, which is not among the artefacts: {', '.join(artefacts)}.")
    return dict(values or {})


def _same_layers(artefacts: Mapping[str, Artefact]) -> list[int]:
    """The layers whose MLPs every artefact replaces."""
    by_name = {name: layers_of(artefact) for name, artefact in artefacts.items()}
    first, *others = by_name.items()
    if not first[1]:
        raise ValueError(f"{first[0]!r} replaces no MLP: give artefacts of MLPs.")
    for name, layers in others:
        if layers != first[1]:
            raise ValueError(
                f"{first[0]!r} replaces the MLPs of layers {first[1]} and {name!r} those of {layers}: compare artefacts of the "
                "same layers."
            )
    return first[1]


def _check_whole_mlps(adapter: Adapter, artefacts: Mapping[str, Artefact]) -> None:
    """Raises ValueError for a decomposition that leaves a part of an MLP to the target, which costs it no pieces."""
    for name, artefact in artefacts.items():
        if isinstance(artefact, Decomposition):
            layers = layers_of(artefact)
            of_mlps = [site.name for site in mlp_sites(adapter.sites.values()) if site.layer in layers]
            if missing := [site for site in of_mlps if site not in artefact.sites]:
                raise ValueError(
                    f"{name!r} does not decompose {missing[0]}, and artefacts take the place of whole MLPs: decompose all of "
                    "their matrices."
                )


def _zero(
    model: nn.Module, rows: Rows, layers: list[int], config: ComparisonConfig
) -> tuple[PerRow, dict[str, float], int]:
    """The target's cross-entropy by row, the figures when the MLPs put out 0, and the number of real tokens."""
    target, distances, ces, n_tokens = [], [], [], 0
    with ReplacedModel(model, layers) as replaced:
        for at in range(0, len(rows), config.batch_size):
            part = rows.take(slice(at, at + config.batch_size))
            clean = replaced.clean(part.tokens, part.token_mask)
            zeros = {layer: torch.zeros_like(y) for layer, y in clean.outputs.items()}
            output = replaced.with_outputs(part.tokens, zeros, part.token_mask)
            g = torch.ones_like(part.tokens, dtype=clean.output.dtype).unsqueeze(-1)
            ce = ce_by_row(clean.output, part.tokens, part.token_mask)
            batch = Batch(part, g, Reconstruction(clean.output, token_mask=part.token_mask), ce)
            n_tokens += batch.n_tokens
            target.append(ce)
            distances.append(batch.distance(output))
            ces.append(batch.ce(output))
    ce, kl = PerRow.concatenated(target), PerRow.concatenated(distances)
    return ce, {"kl": kl.mean, "ce_increase": PerRow.concatenated(ces).minus(ce).mean}, n_tokens


def _cost(artefact: Artefact, cost: TrainingCost | None) -> dict[str, float]:
    """Training FLOPs and seconds (NaN: not known)."""
    if cost is not None:
        return {"flops": float(cost.flops), "seconds": float("nan") if cost.seconds is None else float(cost.seconds)}
    record = artefact.record if isinstance(artefact, Transcoders) else {}
    return {name: float(record.get(name, float("nan"))) for name in ("flops", "seconds")}
