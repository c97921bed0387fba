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
    index_bits     l0 · log₂(alive): to name the active pieces, with equal lengths (clustering cost of the paper at α = 0)
    entropy_bits   Σ_c H₂(f_c), f_c how often piece c is active: the same with a code that knows the frequencies
    pgd_{steps}    KL when a shared adversary switches inactive pieces on (``Replacement.attacked``); errors propagate

What it cannot say: that what is active is a mechanism. Interpretability is not measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from tl_vpd.adapters import adapt
from tl_vpd.baselines.comparison.config import WAYS, ComparisonConfig, TrainingCost
from tl_vpd.baselines.comparison.replacement import Artefact, Replacement, layers_of, replacement_of
from tl_vpd.baselines.comparison.result import Comparison
from tl_vpd.baselines.transcoders.replaced_model import ReplacedModel
from tl_vpd.baselines.transcoders.transcoders import Transcoders
from tl_vpd.checks import config_of, instance, shown, text_of
from tl_vpd.decomposition import Decomposition
from tl_vpd.evaluation.batch import Batch, Rows, ce_by_row
from tl_vpd.evaluation.importance_statistics import ImportanceStatistics
from tl_vpd.evaluation.intervals import PerRow
from tl_vpd.evaluation.sample import all_rows
from tl_vpd.losses import Reconstruction
from tl_vpd.masking import restarted_pgd


@torch.inference_mode(False)
@torch.no_grad()
def compare(
    model: nn.Module,
    tokens: Any,
    artefacts: Mapping[str, Artefact],
    config: ComparisonConfig | None = None,
    *,
    costs: Mapping[str, TrainingCost] | None = None,
) -> Comparison:
    """Measures artefacts of one model on rows of tokens.

    Args:
        model: the target, a language model; its weights, hooks and flags are afterwards as they were.
        tokens: rows ``[n, pos]``, or prompts; padding is left out.
        artefacts: decompositions and transcoders by name. All must replace the MLPs of the same layers; of a decomposition, the
            MLPs' matrices alone are masked.
        config: what is measured (None: ``ComparisonConfig()``).
        costs: of artefacts by name (transcoders that were trained here have theirs in their record).

    Raises:
        KeyError: ``costs`` names something else.
        TypeError: an argument is of another type.
        ValueError: there are no artefacts, they replace other layers, or one does not fit the model.
    """
    config = config_of(ComparisonConfig, config)
    if not isinstance(artefacts, Mapping) or not artefacts:
        raise ValueError(f"artefacts={shown(artefacts)}: give at least one by name.")
    for name, artefact in artefacts.items():
        text_of("A name in artefacts", name)
        instance(f"artefacts[{shown(name)}]", artefact, Decomposition, Transcoders)
    if costs is not None and not isinstance(costs, Mapping):
        raise TypeError(f"costs={shown(costs)} is a {type(costs).__name__}: give a TrainingCost by name.")
    for name, cost in (costs or {}).items():
        if name not in artefacts:
            raise KeyError(f"costs names {shown(name)}, which is not among the artefacts: {', '.join(artefacts)}.")
        instance(f"costs[{shown(name)}]", cost, TrainingCost)
    layers = _same_layers(artefacts)
    adapter = adapt(model)
    rows = all_rows(adapter, tokens)
    tables: dict[str, list[dict[str, Any]]] = {"summary": [], "replacement": [], "modules": [], "attacks": []}
    target, zero, n_tokens = _zero(model, rows, layers, config)
    for name, artefact in artefacts.items():
        for threshold in config.thresholds if isinstance(artefact, Decomposition) else (float("nan"),):
            options: dict[str, Any] = {"batch_size": config.batch_size, "seed": config.seed}
            with replacement_of(artefact, model, rows, threshold, **options) as replacement:
                measured = _Measured(replacement, rows, target, config)
                label = {"artefact": name, "threshold": threshold}
                tables["replacement"] += [label | row for row in measured.replacement]
                tables["modules"] += [label | row for row in measured.modules()]
                tables["attacks"] += [label | row for row in measured.attacks]
                tables["summary"].append(label | measured.summary() | _cost(artefact, (costs or {}).get(name)))
    frames = {name: pd.DataFrame(found) for name, found in tables.items()}
    return Comparison(frames, target.mean, zero, n_tokens, tuple(layers))


class _Measured:
    """The figures of one artefact at one threshold.

    Args:
        replacement: the artefact on the model.
        rows: of tokens.
        target: the target's cross-entropy by row.
        config: of the comparison.
    """

    def __init__(self, replacement: Replacement, rows: Rows, target: PerRow, config: ComparisonConfig) -> None:
        self.on, self.rows, self.target, self.config = replacement, rows, target, config
        self.ways: dict[str, list[tuple[PerRow, PerRow]]] = {}
        self.statistics = ImportanceStatistics.over(self._batches(rows), replacement.axis)
        self.figures = {
            name: tuple(map(PerRow.concatenated, zip(*found, strict=True))) for name, found in self.ways.items()
        }
        alone = [self.figures[f"single-layer, {layer}"] for layer in replacement.writers]
        self.figures["single-layer"] = tuple(
            PerRow(np.mean([f[i].values for f in alone], axis=0), alone[0][i].tokens) for i in (0, 1)
        )
        order = [*WAYS, *(f"single-layer, {layer}" for layer in replacement.writers)]
        self.replacement = [{"replaced": way, **self._figures(way)} for way in order]
        self.attacks = [self._attack(steps) for steps in config.budgets]

    def _batches(self, rows: Rows) -> Any:
        """Every batch, whose outputs are measured on the way."""
        size = self.config.batch_size
        for at in range(0, len(rows), size):
            batch = self.on.batch(rows.take(slice(at, at + size)))
            self._note("error-propagating", batch, self.on.output(batch, clean_input=False))
            self._note("clean-input", batch, self.on.output(batch, clean_input=True))
            for layer in self.on.writers:
                self._note(f"single-layer, {layer}", batch, self.on.alone(batch, layer))
            yield batch

    def _note(self, way: str, batch: Batch, output: Tensor) -> None:
        self.ways.setdefault(way, []).append((batch.distance(output), batch.ce(output)))

    def _figures(self, way: str) -> dict[str, float]:
        distance, ce = self.figures[way]
        increase = ce.minus(self.target)
        return {**distance.columns(seed=self.config.seed), **increase.columns("ce_increase", seed=self.config.seed)}

    def modules(self) -> list[dict[str, Any]]:
        """A row for each weight matrix, or layer of latents."""
        axis = self.on.axis
        by_module = axis.split_sites(self.statistics.density)
        return [
            {
                "module": name,
                "built": axis.counts[name],
                "alive": int((density > 0).sum()),
                "l0": float(density.sum()),
                "parameters": self.on.parameters[name],
            }
            for name, density in by_module.items()
        ]

    def summary(self) -> dict[str, Any]:
        """The artefact's row."""
        density = self.statistics.density.double()
        l0 = {name: float(d.sum()) for name, d in self.on.axis.split_sites(density).items()}
        total, alive = sum(l0.values()), int((density > 0).sum())
        row: dict[str, Any] = {"kind": self.on.kind, "built": self.on.axis.total, "alive": alive}
        row |= {"dead": row["built"] - alive, **self.statistics.l0.columns("l0", seed=self.config.seed)}
        row["per_module"] = total / len(l0)
        row["per_mlp"] = sum(l0[name] for names in self.on.writers.values() for name in names) / len(self.on.writers)
        row["parameters"] = self.on.always_on + sum(self.on.parameters[name] * n for name, n in l0.items())
        row["index_bits"] = total * float(np.log2(max(alive, 1)))
        row["entropy_bits"] = entropy_bits(density)
        for way in WAYS:
            prefix = "" if way == WAYS[0] else way.replace("-", "_") + "_"
            row |= {f"{prefix}{column}": value for column, value in self._figures(way).items()}
        for attack in self.attacks:
            row |= {f"pgd_{attack['steps']}{end}": attack[f"kl{end}"] for end in ("", "_low", "_high")}
        return row

    def _attack(self, steps: int) -> dict[str, Any]:
        """Sources shared by all tokens of the attacked rows, moved up the KL."""
        rows, size = self.rows, self.config.batch_size
        n = len(rows) if self.config.attack_rows is None else min(self.config.attack_rows, len(rows))
        batches = [self.on.batch(rows.take(slice(at, min(at + size, n)))) for at in range(0, n, size)]
        tokens = sum(batch.n_tokens for batch in batches)

        def loss(sources: Tensor) -> Tensor:
            total = torch.zeros((), dtype=torch.float64)
            for batch in batches:
                part = batch.reconstruction(self.on.attacked(batch, sources)) * (batch.n_tokens / tokens)
                if part.requires_grad:
                    part.backward(inputs=[sources])  # type: ignore[no-untyped-call]
                total += part.detach().to(total)
            return total

        generator = torch.Generator().manual_seed(self.config.seed % (1 << 63))
        start = torch.rand(1, 1, self.on.n_sources, generator=generator).to(batches[0].g)
        sources = restarted_pgd(loss, [start], steps=steps)[0].sources
        by_row = PerRow.concatenated([batch.distance(self.on.attacked(batch, sources)) for batch in batches])
        budget = {"steps": steps, "step_size": 2 / steps, "tokens": tokens}
        return {**budget, **by_row.columns(seed=self.config.seed)}


def entropy_bits(density: Tensor) -> float:
    """``Σ_c H₂(f_c)`` in bits, f_c how often each piece is active."""
    f = density[(density > 0) & (density < 1)].double()
    return float(-(f * f.log2() + (1 - f) * (1 - f).log2()).sum())


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
