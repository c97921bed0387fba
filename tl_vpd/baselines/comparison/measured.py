"""The figures of one artefact at one threshold, measured on batches of rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tl_vpd.baselines.comparison.config import WAYS, ComparisonConfig
from tl_vpd.baselines.comparison.replacement import Replacement
from tl_vpd.evaluation.batch import Batch, Rows
from tl_vpd.evaluation.importance_statistics import ImportanceStatistics
from tl_vpd.evaluation.intervals import PerRow
from tl_vpd.masking import restarted_pgd


class Measured:
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

    @property
    def alive(self) -> dict[str, Tensor]:
        """Which pieces of each module are active at one token or more."""
        return {name: density > 0 for name, density in self.on.axis.split_sites(self.statistics.density).items()}

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
        row: dict[str, Any] = {
            "kind": self.on.kind,
            "trained_in": self.on.trained_in,
            "built": self.on.axis.total,
            "alive": alive,
        }
        row |= {"dead": row["built"] - alive, **self.statistics.l0.columns("l0", seed=self.config.seed)}
        row["per_module"] = total / len(l0)
        row["per_mlp"] = sum(l0[name] for names in self.on.writers.values() for name in names) / len(self.on.writers)
        row["parameters"] = self.on.always_on + sum(self.on.parameters[name] * n for name, n in l0.items())
        row["index_bits"] = total * float(np.log2(max(alive, 1)))
        row["entropy_bits"] = entropy_bits(density)
        for way in WAYS:
            prefix = "" if way == WAYS[0] else way.replace("-", "_") + "_"
            row |= {f"{prefix}{column}": value for column, value in self._figures(way).items()}
        row["mismatch"] = self._mismatch()
        for attack in self.attacks:
            row |= {f"pgd_{attack['steps']}{end}": attack[f"kl{end}"] for end in ("", "_low", "_high")}
        return row

    def _mismatch(self) -> float:
        """The largest KL in another way over the KL in the way that was trained (NaN: none was)."""
        kl = {way: self.figures[way][0].mean for way in WAYS}
        trained = kl.pop(self.on.trained_in, float("nan"))
        return max(kl.values()) / trained if trained else float("nan")

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
