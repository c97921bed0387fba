"""The mask-mode table: how far the masked model is from the target in every mode.

For each mode the cross-entropy of the next token, the KL from the target, and *compute recovered* (VPD paper): the share of the
target's training at which its validation curve first reached the masked model's cross-entropy. Δ is 0 and every site is masked,
except that the stochastic mode masks Δ at random as well. *Partial* uses the important subcomponents (g > 0) and each of the
others with probability one half, Δ at 0: what may be left out altogether must also be free to be left out in part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from tl_vpd.checks import item, number, shown
from tl_vpd.evaluation.config import checked_curve
from tl_vpd.evaluation.sample import MasksOf, Sample
from tl_vpd.masking import Masks, constant_masks, masks_from_sources
from tl_vpd.masking.modes import Mode, masks_of_mode
from tl_vpd.site import ConcatenatedAxis

ROWS: dict[str, tuple[Mode | Literal["partial"], float]] = {
    "unmasked": ("unmasked", 0.0),
    "stochastic": ("stochastic", 0.0),
    "rounded": ("rounded", 0.0),
    "rounded_0.1": ("rounded", 0.1),
    "rounded_0.5": ("rounded", 0.5),
    "ci": ("ci", 0.0),
    "zero": ("zero", 0.0),
    "partial": ("partial", 0.0),
}
"""Row of the table -> (mode, threshold)."""

Uniform = Callable[[int], Float[Tensor, "row *pos n"]]
"""Gives n uniform numbers in [0, 1) for each token."""


def row_masks(row: str, g: Float[Tensor, "row *pos C_total"], site_axis: ConcatenatedAxis, uniform: Uniform) -> Masks:
    """The masks of a row of the table from importances."""
    mode, threshold = ROWS[row]
    if mode == "partial":
        half = uniform(site_axis.total) < 0.5
        return constant_masks(((g > threshold) | half).to(g.dtype), 0.0, site_axis)
    if mode == "stochastic":
        return masks_from_sources(g, uniform(site_axis.total + len(site_axis.names)).to(g), site_axis)
    return rounded_masks(g, site_axis, threshold) if mode == "rounded" else masks_of_mode(mode, g, site_axis)


def rounded_masks(g: Float[Tensor, "row *pos C_total"], site_axis: ConcatenatedAxis, threshold: float = 0.0) -> Masks:
    """1 where an importance is above the threshold, else 0; Δ 0."""
    return constant_masks((g > threshold).to(g.dtype), 0.0, site_axis)


def masks_in_row(sample: Sample, row: str) -> MasksOf:
    """A row's masks for each batch of a sample."""
    return lambda batch: row_masks(
        row, batch.g, sample.site_axis, lambda n: sample.uniform(row, batch.rows, (*batch.g.shape[1:-1], n))
    )


def rounded(sample: Sample, threshold: float = 0.0) -> MasksOf:
    """Rounded masks for each batch of a sample."""
    return lambda batch: rounded_masks(batch.g, sample.site_axis, threshold)


def compute_recovered(ce: float, curve: Sequence[Sequence[int | float]]) -> float:
    """Share of training steps after which the target's curve of (step, CE) first reached ``ce`` (linear in between).

    Where the curve's first point is there already, that point's share (an upper bound); 1 where no point is. NaN for a NaN
    cross-entropy (no row has a next token).

    Raises:
        TypeError: the curve is not a list of pairs of numbers.
        ValueError: its steps do not rise.
    """
    if not isinstance(ce := item(ce), int | float) or isinstance(ce, bool):
        raise TypeError(f"ce={shown(ce)} is a {type(ce).__name__}: give a number of nats.")
    curve = checked_curve(curve)
    if isinstance(ce, int):
        ce = number("ce", ce)  # an integer may be beyond floats
    if math.isnan(ce):
        return ce
    last = curve[-1][0]
    previous = curve[0]
    if previous[1] <= ce:
        return previous[0] / last
    for point in curve[1:]:
        if point[1] <= ce:
            fraction = (previous[1] - ce) / (previous[1] - point[1])
            return (previous[0] + fraction * (point[0] - previous[0])) / last
        previous = point
    return 1.0
