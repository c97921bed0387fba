"""The flat record of one sample: mode table, L0, alive counts, and what the standard adversary finds.

Keys are described in ``docs/evaluation.md``. Numbers are plain Python, so that the record is JSON.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tl_vpd.evaluation.adversaries import Adversary, attack
from tl_vpd.evaluation.intervals import METHOD, PerRow
from tl_vpd.evaluation.modes import ROWS, compute_recovered, row_masks
from tl_vpd.evaluation.sample import ALIVE, Sample

SURE = 0.99
"""Importance from which a subcomponent counts as protected from any ablation."""


@torch.no_grad()
def record_of(
    sample: Sample,
    *,
    budgets: Sequence[int] = (),
    starts: int | Mapping[int, int] = 1,
    attack_rows: int | None = None,
    curve: Sequence[Sequence[int | float]] | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The flat record, and the rows of the table of adversaries that its attacks give."""
    found = {row: _row(sample, row, number) for number, row in enumerate(ROWS)}
    kl = {row: own for row, (own, _) in found.items()}
    ce = {row: own for row, (_, own) in found.items() if own is not None}
    l0 = PerRow.joined([_l0(sample, i) for i in range(len(sample.g))])
    record: dict[str, Any] = {}
    if sample.logits:
        target = PerRow.joined(sample.target_ce)
        record["target_ce"] = target.mean
        record |= {f"{row}_ce": own.mean for row, own in ce.items()}
    record |= _counts(sample)
    record["kl"] = {row: own.mean for row, own in kl.items()}
    recovered = curve is not None and sample.logits
    record["compute_recovered"] = (
        {row: compute_recovered(own.mean, curve) for row, own in ce.items()} if recovered and curve else {}
    )
    many = {steps: starts if isinstance(starts, int) else starts.get(steps, 1) for steps in budgets}
    attacked = sample.first(attack_rows)
    attacks = [attack(attacked, Adversary(steps=steps, starts=many[steps])) for steps in budgets]
    record["pgd_kl"] = {str(a.adversary.steps): a.kl for a in attacks}
    record["pgd_kl_starts"] = {str(a.adversary.steps): [r.loss for r in a.results] for a in attacks}
    record["pgd_tokens"] = attacked.tokens_total
    record["intervals"] = {
        "method": METHOD,
        "kl": {row: _bounds(own, sample) for row, own in kl.items()},
        "ce_above_target": {row: _bounds(own.minus(target), sample) for row, own in ce.items()},
        "l0": _bounds(l0, sample),
        "pgd_kl": {str(a.adversary.steps): _bounds(a.by_row, sample) for a in attacks},
    }
    record["output"] = sample.measure
    record["importances"] = importance_shape(sample)
    return record, [a.record(seed=sample.seed) for a in attacks]


def _bounds(found: PerRow, sample: Sample) -> list[float] | None:
    """The interval as JSON has it (None: one row has none)."""
    low, high = found.interval(seed=sample.seed)
    return None if low != low else [low, high]


def _row(sample: Sample, row: str, number: int) -> tuple[PerRow, PerRow | None]:
    """(distance, cross-entropy) in one row of the mode table."""
    return sample.outcome(
        lambda i: row_masks(row, sample.g[i], sample.site_axis, sample.generator(1000 * number + i)),
    )


def _l0(sample: Sample, i: int) -> PerRow:
    g, token_mask = sample.g[i], sample.token_mask[i]
    on = (g > 0).sum(-1).reshape(len(g), -1).double()  # 0 at padding
    n = torch.full((len(g),), on.shape[1], device=on.device) if token_mask is None else token_mask.sum(1)
    return PerRow((on.sum(1) / n.clamp(min=1)).cpu().numpy(), n.double().cpu().numpy())


def _counts(sample: Sample) -> dict[str, Any]:
    site_axis, total, mean_g = sample.site_axis, sample.tokens_total, sample.mean_importances()
    l0 = torch.stack([(g > 0).flatten(0, -2).sum(0) for g in sample.g]).sum(0) / total
    by_site = {name: mean_g[where] for name, where in site_axis.slices.items()}
    return {
        "l0": float(l0.sum()),
        "l0_by_site": {name: float(l0[where].sum()) for name, where in site_axis.slices.items()},
        "alive": int((mean_g > ALIVE).sum()),
        "alive_1e-4": int((mean_g > 1e-4).sum()),
        "alive_by_site": {name: int((own > ALIVE).sum()) for name, own in by_site.items()},
        "built": site_axis.total,
        "built_by_site": dict(site_axis.counts),
        "summed_rank": sum(site.rank for site in sample.weights.sites.values()),
        "tokens": total,
        "rows": sum(len(t) for t in sample.tokens),
    }


def importance_shape(sample: Sample) -> dict[str, float]:
    """How importances are spread: what a collapsed Γ or a lookup table shows at once.

    ``largest``; ``at_1``, the share of those above 0 that are at least 0.99; ``tokens_at_1``, the share of tokens at which any
    is; ``one_row``, the share of all importance that lies on subcomponents which are important in a single row.
    """
    positive = sure = tokens = 0
    largest = 0.0
    in_rows = torch.zeros(sample.site_axis.total, dtype=torch.long, device=sample.g[0].device)
    for g in sample.g:
        positive += int((g > 0).sum())
        sure += int((g >= SURE).sum())
        tokens += int((g >= SURE).any(-1).sum())
        largest = max(largest, float(g.max()))
        in_rows += (g > 0).reshape(len(g), -1, sample.site_axis.total).any(1).sum(0)
    mean = sample.mean_importances()
    mass = float(mean.sum())
    return {
        "largest": largest,
        "at_1": sure / positive if positive else 0.0,
        "tokens_at_1": tokens / sample.tokens_total,
        "one_row": float(mean[in_rows == 1].sum()) / mass if mass else 0.0,
    }
