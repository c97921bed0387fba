"""Future leakage: how much of a masked model's cross-entropy comes from Γ's view of the tokens that follow.

Γ reads the whole window, so the importances at a position may depend on the very token that is to be predicted there. The
KL to the target gains nothing from this; the cross-entropy of the masked model can, and may even fall below the
target's. The measure computes every position twice: with importances from the whole window, and with importances from the
prefix only.

    >>> future_leakage(sample, positions=[31, 63])                                  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor

from tl_vpd.checks import choice, integer, sequence
from tl_vpd.evaluation.batch import Batch, Rows
from tl_vpd.evaluation.modes import row_masks
from tl_vpd.evaluation.sample import Sample, measure

MODES = ("rounded", "rounded_0.1", "rounded_0.5", "ci", "stochastic", "partial")
"""Rows of the mode table whose masks depend on importances."""


@measure
def future_leakage(sample: Sample, *, positions: Sequence[int], mode: str = "rounded") -> pd.DataFrame:
    """Cross-entropy and KL at chosen positions, in nats: the target's, and the masked model's with either view of Γ.

    Args:
        sample: rows without padding.
        positions: where the next token is predicted, from 0 to ``pos − 2``; each costs two passes over the prefix.
        mode: a row of the mode table that needs importances.

    Raises:
        ValueError: the model returns no next-token predictions, rows are padded, or no such mode needs importances.
        IndexError: a position has no next token in the rows.
    """
    reason = why_not(sample)
    if reason:
        raise ValueError(f"Future leakage cannot be measured: {reason}.")
    choice("mode", mode, MODES)
    positions = [integer(f"positions[{i}]", p) for i, p in enumerate(sequence("positions", positions))]
    if not positions:
        raise ValueError("positions=[]: give at least one.")
    length = sample.rows.tokens.shape[1]
    beyond = [p for p in positions if not 0 <= p < length - 1]
    if beyond:
        raise IndexError(f"Positions {beyond} have no next token in rows of {length} tokens.")
    batches = [_by_position(sample, batch, positions, mode) for batch in sample.batches()]
    rows = [
        {"position": p, **{name: float(np.concatenate([b[p][name] for b in batches]).mean()) for name in batches[0][p]}}
        for p in positions
    ]
    return pd.DataFrame(rows).set_index("position")


def why_not(sample: Sample) -> str:
    """Why Γ cannot get prefixes of these rows (empty: it can)."""
    if not sample.has_logits:
        return "the model returns no next-token predictions"
    if sample.rows.token_mask is not None and not bool(sample.rows.token_mask.all()):
        return "some rows are padded"
    return "the rows are shorter than three tokens" if sample.rows.tokens.shape[1] < 3 else ""


def _by_position(
    sample: Sample, batch: Batch, positions: Sequence[int], mode: str
) -> dict[int, dict[str, Float[np.ndarray, " row"]]]:
    """A batch's figures by position and row."""
    tokens, length = batch.rows.tokens, batch.rows.tokens.shape[1]

    def log_probs(g: Tensor, rows: Rows) -> Tensor:
        end = g.shape[1]
        masks = row_masks(mode, g, sample.site_axis, lambda n: sample.uniform(mode, rows, (length, n))[:, :end])
        return sample.masked_model.masked(rows.tokens, masks).float().log_softmax(-1)

    whole = log_probs(batch.g, batch.rows)
    figures = {}
    for p in positions:
        prefix = Rows(tokens[:, : p + 1], None, batch.rows.numbers)
        alone = log_probs(sample.importances(sample, prefix, sample.clean(prefix)[1]), prefix)[:, -1]
        target, following = batch.reconstruction.target[:, p], tokens[:, p + 1]
        figures[p] = {
            "target_ce": _ce(target, following),
            "whole_ce": _ce(whole[:, p], following),
            "prefix_ce": _ce(alone, following),
            "whole_kl": _kl(target, whole[:, p]),
            "prefix_kl": _kl(target, alone),
        }
    return figures


def _ce(log_p: Float[Tensor, "row vocab"], following: Int[Tensor, " row"]) -> Float[np.ndarray, " row"]:
    return -log_p.gather(-1, following[:, None])[:, 0].double().cpu().numpy()


def _kl(target: Float[Tensor, "row vocab"], masked: Float[Tensor, "row vocab"]) -> Float[np.ndarray, " row"]:
    return (target.exp() * (target - masked)).sum(-1).double().cpu().numpy()
