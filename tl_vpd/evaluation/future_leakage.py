"""Future leakage: how much of a masked model's cross-entropy comes from Γ's view of the tokens that follow.

A bidirectional Γ reads the whole window, so the importances at a position may depend on the very token that is to be predicted
there. The KL to the target gains nothing from this; the cross-entropy of the masked model can, and may even fall below the
target's. The measure computes chosen positions twice, with importances from the whole window and from the prefix alone:

    leak = CE(importances from the prefix) − CE(importances from the whole window)

With a causal Γ both are the same importances, which is measured as well: ``importance_change``, the largest change of any
importance at a position and those before it, is then no more than rounding.

    >>> future_leakage(sample, positions=[31, 63])                                  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_vpd.checks import choice, integer, sequence
from tl_vpd.evaluation.batch import Batch, Rows
from tl_vpd.evaluation.intervals import PerRow
from tl_vpd.evaluation.modes import row_masks
from tl_vpd.evaluation.sample import Sample, measure
from tl_vpd.printing import Printed

MODES = ("rounded", "rounded_0.1", "rounded_0.5", "ci", "stochastic", "partial")
"""Rows of the mode table whose masks depend on importances."""
STANDARD_MODES = ("rounded", "ci", "stochastic")
"""Those of a report."""
FIGURES = ("target_ce", "whole_ce", "prefix_ce", "whole_kl", "prefix_kl")


@dataclass(frozen=True)
class Leakage(Printed):
    """Figures ``[row, position]`` by mode and name, in nats; NaN where a row has no next token.

    ``importance_change``: by row and position, the largest change of an importance in the prefix.
    """

    positions: list[int]
    figures: dict[str, dict[str, Float[np.ndarray, "row position"]]]
    importance_change: Float[np.ndarray, "row position"]

    def leak(self, mode: str) -> PerRow:
        """A mode's leak by row, each the mean over its positions."""
        values = self.figures[mode]["prefix_ce"] - self.figures[mode]["whole_ce"]
        counts = np.isfinite(values).sum(1)
        return PerRow(np.nansum(values, 1) / counts.clip(min=1), counts.astype(float))

    def to_pandas(self, *, seed: int = 0) -> pd.DataFrame:
        """A row for each mode and position: cross-entropies, the leak with its interval over rows, KL, change."""
        table = []
        for mode, figures in self.figures.items():
            for i, position in enumerate(self.positions):
                there = np.isfinite(figures["target_ce"][:, i])
                means = {name: float(values[there, i].mean()) for name, values in figures.items()}
                leak = PerRow((figures["prefix_ce"] - figures["whole_ce"])[there, i], np.ones(int(there.sum())))
                change = float(self.importance_change[there, i].max())
                row = {"mode": mode, "position": position, "rows": int(there.sum()), **means}
                table.append({**row, **leak.columns("leak", seed=seed), "importance_change": change})
        return pd.DataFrame(table).set_index(["mode", "position"])


@measure
def leakage(sample: Sample, *, positions: Sequence[int], modes: Sequence[str] = ("rounded",)) -> Leakage:
    """The figures of ``future_leakage`` by row, with the same arguments and errors."""
    reason = why_not(sample)
    if reason:
        raise ValueError(f"Future leakage cannot be measured: {reason}.")
    modes = [choice(f"modes[{i}]", mode, MODES) for i, mode in enumerate(sequence("modes", modes))]
    positions = [integer(f"positions[{i}]", p) for i, p in enumerate(sequence("positions", positions))]
    if not positions or not modes:
        raise ValueError(f"{'modes' if positions else 'positions'}=[]: give at least one.")
    length, possible = sample.rows.tokens.shape[1], pairs_of(sample.rows).any(0).tolist()
    beyond = [p for p in positions if not 0 <= p < length - 1 or not possible[p]]
    if beyond:
        raise IndexError(f"Positions {beyond} have no next token in rows of {length} tokens.")
    batches = [_of_batch(sample, batch, positions, modes) for batch in sample.batches()]
    figures = {
        mode: {name: np.concatenate([figures[mode][name] for figures, _ in batches]) for name in FIGURES}
        for mode in modes
    }
    return Leakage(positions, figures, np.concatenate([change for _, change in batches]))


def future_leakage(sample: Sample, *, positions: Sequence[int], modes: Sequence[str] = ("rounded",)) -> pd.DataFrame:
    """Cross-entropy and KL by mode and position, in nats: the target's, and the masked model's with either view of Γ.

    Args:
        sample: rows; those that have no next token at a position stay out there.
        positions: where the next token is predicted, from 0 to ``pos − 2``; each costs a clean pass over the prefix, and a masked
            one for every mode.
        modes: rows of the mode table that need importances.

    Raises:
        ValueError: the model returns no next-token predictions, or no such mode needs importances.
        IndexError: a position has no next token in any row.
    """
    return leakage(sample, positions=positions, modes=modes).to_pandas(seed=sample.seed)


def spread_positions(sample: Sample, n: int) -> list[int]:
    """Up to n positions that have a next token, evenly spread over those there are, the last among them."""
    possible = pairs_of(sample.rows).any(0).nonzero()[:, 0].tolist()
    possible = [p for p in possible if p > 0] or possible
    return sorted({possible[(len(possible) * k - 1) // n] for k in range(1, n + 1) if len(possible) * k >= n})


def pairs_of(rows: Rows) -> Bool[Tensor, "row _"]:
    """Where a real token is followed by another."""
    mask = rows.token_mask
    return torch.ones_like(rows.tokens[:, 1:], dtype=torch.bool) if mask is None else mask[:, :-1] & mask[:, 1:]


def why_not(sample: Sample) -> str:
    """Why nothing can leak, or be measured, on these rows (empty: it can)."""
    if not sample.has_logits:
        return "the model returns no next-token predictions"
    if sample.rows.tokens.shape[1] < 3:
        return "the rows are shorter than three tokens"
    return "" if bool(pairs_of(sample.rows).any()) else "no row has two real tokens, one after the other"


def _of_batch(
    sample: Sample, batch: Batch, positions: Sequence[int], modes: Sequence[str]
) -> tuple[dict[str, dict[str, Float[np.ndarray, "row position"]]], Float[np.ndarray, "row position"]]:
    """A batch's figures by mode, and its changes of importances."""
    pairs = pairs_of(batch.rows)
    shape = (len(batch.rows), len(positions))
    figures = {mode: {name: np.full(shape, np.nan) for name in FIGURES} for mode in modes}
    change = np.full(shape, np.nan)
    whole = {mode: _log_probs(sample, batch.rows, batch.g, mode, positions) for mode in modes}
    for i, p in enumerate(positions):
        there = pairs[:, p].nonzero()[:, 0].tolist()
        if not there:
            continue
        rows = batch.rows.take(there)
        mask = None if rows.token_mask is None else rows.token_mask[:, : p + 1]
        prefix, following = Rows(rows.tokens[:, : p + 1], mask, rows.numbers), rows.tokens[:, p + 1]
        g = sample.importances(sample, prefix, sample.clean(prefix)[1])
        change[there, i] = _plain((g - batch.g[there, : p + 1]).abs().flatten(1).amax(1))
        target = batch.reconstruction.target[there, p]
        for mode in modes:
            seen, alone = whole[mode][there, i], _log_probs(sample, prefix, g, mode, [p])[:, 0]
            values = (
                *(_ce(log_p, following) for log_p in (target, seen, alone)),
                *(_kl(target, log_p) for log_p in (seen, alone)),
            )
            for name, value in zip(FIGURES, values, strict=True):
                figures[mode][name][there, i] = value
    return figures, change


def _log_probs(
    sample: Sample, rows: Rows, g: Float[Tensor, "row pos C_total"], mode: str, positions: Sequence[int]
) -> Float[Tensor, "row position vocab"]:
    """The masked model's log-probabilities at positions; random masks are the same whatever the length of the rows."""
    length, end = sample.rows.tokens.shape[1], g.shape[1]
    masks = row_masks(mode, g, sample.site_axis, lambda n: sample.uniform(mode, rows, (length, n))[:, :end])
    output = sample.masked_model.masked(rows.tokens, masks, rows.token_mask)
    return output[:, list(positions)].float().log_softmax(-1)


def _ce(log_p: Float[Tensor, "row vocab"], following: Int[Tensor, " row"]) -> Float[np.ndarray, " row"]:
    return _plain(-log_p.gather(-1, following[:, None])[:, 0])


def _kl(target: Float[Tensor, "row vocab"], masked: Float[Tensor, "row vocab"]) -> Float[np.ndarray, " row"]:
    return _plain((target.exp() * (target - masked)).sum(-1))


def _plain(values: Float[Tensor, " row"]) -> Float[np.ndarray, " row"]:
    return values.double().cpu().numpy()
