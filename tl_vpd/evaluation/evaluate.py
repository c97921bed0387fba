"""``evaluate``: mask modes, L0, alive counts, adversaries and controls of a decomposition on validation tokens.

    >>> report = evaluate(vpd, model, tokens)               # doctest: +SKIP
    >>> report.table()                                      # doctest: +SKIP
    >>> report.save("metrics.json")                         # doctest: +SKIP

What it cannot say: that a subcomponent *is* a mechanism. It says how well the output survives these maskings on these tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor, nn

from tl_vpd.adapters import adapt
from tl_vpd.components import Components
from tl_vpd.decomposition import Decomposition
from tl_vpd.divergence import kl_divergence, next_token_ce
from tl_vpd.evaluation.controls import random_importances, singular_components, singular_importances
from tl_vpd.evaluation.modes import ROWS, compute_recovered, row_masks
from tl_vpd.hooks.tapped import TappedModel
from tl_vpd.importance import lower_leaky
from tl_vpd.masking import fresh_pgd, masks_from_sources
from tl_vpd.storage import write_json

BUDGETS = (20, 40, 80, 160, 320)
ALIVE = 1e-6
"""Mean importance above which a subcomponent counts as alive."""


@dataclass(frozen=True)
class Evaluation:
    """The flat record of an evaluation; ``controls`` holds records of the same form."""

    record: dict[str, Any]

    def table(self) -> pd.DataFrame:
        """One row a mask mode: CE, CE above the target, its share of (zero − target), KL, compute recovered."""
        own = self.record
        span = own["zero_ce"] - own["target_ce"]
        rows = []
        for name in ROWS:
            ce = own[f"{name}_ce"]
            above = ce - own["target_ce"]
            row = {"mode": name, "ce": ce, "above_target": above, "share_of_zero": above / span, "kl": own["kl"][name]}
            if own["compute_recovered"]:
                row["compute_recovered"] = own["compute_recovered"][name]
            rows.append(row)
        return pd.DataFrame(rows).set_index("mode")

    def pgd_table(self) -> pd.DataFrame:
        """KL under the fresh adversary by number of steps (steps × size = 2)."""
        curve = self.record["pgd_kl"]
        return pd.DataFrame({"steps": [int(k) for k in curve], "kl": list(curve.values())}).set_index("steps")

    def sites_table(self) -> pd.DataFrame:
        """L0 a token, alive and built subcomponents by site."""
        own = self.record
        return pd.DataFrame({"l0": own["l0_by_site"], "alive": own["alive_by_site"], "built": own["built_by_site"]})

    def save(self, path: str | Path) -> None:
        """Writes the record as JSON."""
        write_json(Path(path), self.record)


Importances = Callable[[int, Mapping[str, Tensor], Tensor | None], Tensor]
"""(batch index, clean site inputs, padding) -> packed importances."""


@torch.no_grad()
def evaluate(
    decomposition: Decomposition,
    model: nn.Module,
    tokens: Int[Tensor, "n pos"],
    *,
    budgets: Sequence[int] = BUDGETS,
    starts: int | Mapping[int, int] = 1,
    controls: bool = True,
    control_budgets: Sequence[int] = (20,),
    batch_size: int = 16,
    seed: int = 0,
    curve: Sequence[Sequence[int | float]] | None = None,
) -> Evaluation:
    """Measures a decomposition on rows of tokens.

    Args:
        tokens: rows ``[n, pos]``; padding is left out.
        budgets: steps of the fresh adversary (each with ``step_size = 2 / steps``); it attacks all rows together with
            sources shared over them, Δ's included.
        starts: random starts of each budget, or of some by their steps (the others get one); ``pgd_kl`` gives the worst,
            ``pgd_kl_starts`` all.
        controls: also measure the random and singular controls. control_budgets: their adversary's.
        curve: the target's own validation curve of (step, CE), for compute recovered.

    Raises:
        ValueError: the tokens or the decomposition do not fit the model.
    """
    tokens = adapt(model).tokens(tokens)

    def learned(index: int, inputs: Mapping[str, Tensor], keep: Tensor | None) -> Tensor:
        g = lower_leaky(decomposition.pre_sigmoid(inputs, keep))
        return g if keep is None else g * keep[..., None]

    def measured(parts: Decomposition | Components, importances: Importances, steps: Sequence[int]) -> dict[str, Any]:
        with TappedModel(parts, model) as tapped:
            return _Measurement(parts, tapped, importances, tokens, batch_size, seed).record(steps, starts, curve)

    with TappedModel(decomposition, model) as tapped:
        weights = {name: tapped.adapter.weight(name) for name in decomposition.sites}
        before = {name: W.clone() for name, W in weights.items()}
    record = measured(decomposition, learned, budgets)
    mean_g = record.pop("mean_g")
    if controls:
        packing, alive = decomposition.packing, mean_g > ALIVE
        singular = singular_components(decomposition.sites, weights)

        def at_random(index: int, inputs: Mapping[str, Tensor], keep: Tensor | None) -> Tensor:
            generator = torch.Generator(tokens.device).manual_seed(seed * 1_000_003 + index)
            return random_importances(learned(index, inputs, keep), alive, packing, generator)

        def by_strength(index: int, inputs: Mapping[str, Tensor], keep: Tensor | None) -> Tensor:
            return singular_importances(learned(index, inputs, keep), packing, inputs, singular)

        record["controls"] = {
            "random": measured(decomposition, at_random, control_budgets),
            "singular": measured(singular, by_strength, control_budgets),
        }
        for control in record["controls"].values():
            del control["mean_g"]
    after = {name: adapt(model).weight(name) for name in before}
    record["target_params_max_change"] = max(float((after[n] - W).abs().max()) for n, W in before.items())
    record["faithfulness"] = {
        n: float(decomposition.components.delta(n, W).square().mean()) for n, W in weights.items()
    }
    return Evaluation(record)


class _Measurement:
    """The measures of one set of components with one way to get importances."""

    def __init__(
        self,
        parts: Decomposition | Components,
        tapped: TappedModel,
        importances: Importances,
        tokens: Int[Tensor, "n pos"],
        batch_size: int,
        seed: int,
    ) -> None:
        self.parts, self.tapped, self.packing, self.seed = parts, tapped, parts.packing, seed
        self.tokens = list(tokens.split(batch_size))
        self.keep = [tapped.adapter.padding(t, None) for t in self.tokens]
        self.positions = [int(t.numel() if k is None else k.sum()) for t, k in zip(self.tokens, self.keep, strict=True)]
        self.target: list[Tensor] = []
        self.g: list[Tensor] = []
        self.target_ce: list[float] = []
        for i, (t, k) in enumerate(zip(self.tokens, self.keep, strict=True)):
            logits, inputs = tapped.clean(t, k)
            self.target.append(logits.float().log_softmax(-1))
            self.g.append(importances(i, inputs, k))
            self.target_ce.append(float(next_token_ce(logits, t, k)))

    def _mean(self, values: Sequence[float], weights: Sequence[int]) -> float:
        return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)

    def record(
        self, budgets: Sequence[int], starts: int | Mapping[int, int], curve: Sequence[Sequence[int | float]] | None
    ) -> dict[str, Any]:
        """The flat record, with the tensor ``mean_g`` beside it."""
        pairs = [
            t[:, 1:].numel() if k is None else int((k[:, 1:] & k[:, :-1]).sum())
            for t, k in zip(self.tokens, self.keep, strict=True)
        ]
        ce, kl = {}, {}
        for number, row in enumerate(ROWS):
            found = [self._row(row, i, number) for i in range(len(self.tokens))]
            ce[row] = self._mean([c for c, _ in found], pairs)
            kl[row] = self._mean([d for _, d in found], self.positions)
        total = sum(self.positions)
        mean_g = torch.stack([g.sum((0, 1)) for g in self.g]).sum(0) / total
        l0 = torch.stack([(g > 0).sum((0, 1)) for g in self.g]).sum(0) / total
        many = {steps: starts if isinstance(starts, int) else starts.get(steps, 1) for steps in budgets}
        attacks = {str(steps): [self._attack(steps, start) for start in range(many[steps])] for steps in budgets}
        by_site = {name: mean_g[where] for name, where in self.packing.slices.items()}
        return {
            "target_ce": self._mean(self.target_ce, pairs),
            **{f"{row}_ce": value for row, value in ce.items()},
            "l0": float(l0.sum()),
            "l0_by_site": {name: float(l0[where].sum()) for name, where in self.packing.slices.items()},
            "alive": int((mean_g > ALIVE).sum()),
            "alive_1e-4": int((mean_g > 1e-4).sum()),
            "alive_by_site": {name: int((own > ALIVE).sum()) for name, own in by_site.items()},
            "built": self.packing.total,
            "built_by_site": dict(self.packing.counts),
            "summed_rank": sum(site.rank for site in self.parts.sites.values()),
            "tokens": total,
            "kl": kl,
            "compute_recovered": {} if curve is None else {row: compute_recovered(c, curve) for row, c in ce.items()},
            "pgd_kl": {steps: max(found) for steps, found in attacks.items()},
            "pgd_kl_starts": attacks,
            "mean_g": mean_g,
        }

    def _row(self, row: str, i: int, number: int) -> tuple[float, float]:
        """(CE, KL) of one batch in one row of the table."""
        generator = torch.Generator(self.g[i].device).manual_seed(self.seed * 1_000_003 + 1000 * number + i)
        masks = row_masks(row, self.g[i], self.packing, generator)
        logits = self.tapped.masked(self.tokens[i], masks, self.keep[i])
        ce = next_token_ce(logits, self.tokens[i], self.keep[i])
        return float(ce), float(kl_divergence(self.target[i], logits, self.keep[i]))

    def _attack(self, steps: int, start: int) -> float:
        """KL under the fresh adversary, whose sources are shared over all rows."""
        generator = torch.Generator(self.g[0].device).manual_seed(self.seed * 1_000_003 + 500_000 + start)
        width = self.packing.total + len(self.packing.names)
        first = torch.rand(1, 1, width, generator=generator, device=self.g[0].device).to(self.g[0].dtype)
        shares = [n / sum(self.positions) for n in self.positions]

        def loss(sources: Tensor) -> Tensor:
            """Batch by batch, each with its own backward pass, so that memory does not grow with the rows."""
            value = torch.zeros(())
            for i, share in enumerate(shares):
                masks = masks_from_sources(self.g[i], sources, self.packing)
                logits = self.tapped.masked(self.tokens[i], masks, self.keep[i], constant_parts=True)
                part = share * kl_divergence(self.target[i], logits, self.keep[i])
                if part.requires_grad:
                    part.backward()
                value += part.detach().to(value.device)
            return value

        return fresh_pgd(loss, first, steps=steps).loss
