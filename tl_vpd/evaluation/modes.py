"""The mask-mode table: how far the masked model is from the target in every mode.

For each mode the cross-entropy of the next token, the KL from the target, and *compute recovered*: the share of the target's
training at which its own validation curve first reached the masked model's cross-entropy. Δ is 0 and every site is masked,
except that the stochastic mode draws Δ as well. *Partial* keeps the important subcomponents (g > 0) and each of the others
with probability one half, Δ at 0: what may be left out altogether must also be free to be left out in part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from tl_vpd.masking import Masks, constant_masks
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
"""Row of the table -> (mode, threshold). What a row draws depends on its place: new ones go to the end."""


def row_masks(row: str, g: Tensor, site_axis: ConcatenatedAxis, generator: torch.Generator) -> Masks:
    """The masks of a row of the table from importances ``[batch, pos, C_total]``."""
    mode, threshold = ROWS[row]
    if mode == "partial":
        kept = torch.rand(g.shape, generator=generator, device=generator.device) < 0.5
        return constant_masks(((g > threshold) | kept.to(g.device)).to(g.dtype), 0.0, site_axis)
    return masks_of_mode(mode, g, site_axis, threshold=threshold, generator=generator)


def compute_recovered(ce: float, curve: Sequence[Sequence[int | float]]) -> float:
    """Share of training steps after which the target's curve of (step, CE) first reached ``ce`` (linear in between).

    NaN for a NaN cross-entropy (no row has a next token).
    """
    if math.isnan(ce):
        return ce
    last = curve[-1][0]
    previous = curve[0]
    if previous[1] <= ce:
        return 0.0
    for point in curve[1:]:
        if point[1] <= ce:
            share = (previous[1] - ce) / (previous[1] - point[1])
            return (previous[0] + share * (point[0] - previous[0])) / last
        previous = point
    return 1.0
