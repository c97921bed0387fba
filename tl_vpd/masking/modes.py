"""Mask modes: from causal importances to the masks of a forward pass.

===========  =======================================================  =============
mode         mask of a subcomponent of importance g                   Δ by default
===========  =======================================================  =============
unmasked     1                                                        0
stochastic   ``g + (1 − g) r``, r uniform in [0, 1] for every token   drawn alike
rounded      1 where ``g > threshold``, else 0                        0
ci           g                                                        0
adversarial  ``g + (1 − g) r`` with r found by gradient ascent        attacked alike
zero         0                                                        0
===========  =======================================================  =============

``delta`` overrides the last column: a number, or ``"drawn"``.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_vpd.masking import Masks, constant_masks, masks_from_sources
from tl_vpd.site import ConcatenatedAxis, nearest

Mode = Literal["unmasked", "stochastic", "rounded", "ci", "adversarial", "zero"]
MODES: tuple[Mode, ...] = ("unmasked", "stochastic", "rounded", "ci", "adversarial", "zero")
NEED_IMPORTANCES = ("stochastic", "rounded", "ci", "adversarial")
Delta = float | Literal["drawn"] | None


def check_mode(mode: str, delta: Delta | str) -> None:
    """Raises ValueError for an unknown mode or an impossible ``delta``."""
    if mode not in MODES:
        raise ValueError(f"{mode!r} is no mask mode{nearest(mode, MODES)}. Modes: {', '.join(MODES)}.")
    if isinstance(delta, str) and delta != "drawn":
        raise ValueError(f"delta={delta!r}: give a number, 'drawn', or None for the mode's default.")
    if mode == "adversarial" and delta is not None:
        raise ValueError("The adversarial mode attacks Δ as well; leave delta at None.")


def masks_of_mode(
    mode: Mode,
    g: Float[Tensor, "*batch C_total"],
    site_axis: ConcatenatedAxis,
    *,
    threshold: float = 0.0,
    delta: Delta = None,
    generator: torch.Generator | None = None,
) -> Masks:
    """The masks of every mode but ``adversarial``, which needs a model to attack.

    Draws on ``generator`` (None: torch's global one) for ``stochastic`` and for ``delta="drawn"``.
    """
    if delta is None:
        delta = "drawn" if mode == "stochastic" else 0.0
    shape = g.shape[:-1]

    def uniform(*size: int) -> Tensor:
        device = g.device if generator is None else generator.device
        return torch.rand(*size, generator=generator, device=device, dtype=torch.float32).to(g)

    n = len(site_axis.names)
    if mode == "stochastic":
        deltas = uniform(*shape, n) if delta == "drawn" else torch.full((*shape, n), float(delta)).to(g)
        return masks_from_sources(g, torch.cat([uniform(*g.shape), deltas], dim=-1), site_axis)
    mask = {
        "unmasked": lambda: torch.ones_like(g),
        "zero": lambda: torch.zeros_like(g),
        "ci": lambda: g,
        "rounded": lambda: (g > threshold).to(g.dtype),
    }[mode]()
    if delta == "drawn":
        return masks_from_sources(mask, torch.cat([torch.zeros_like(g), uniform(*shape, n)], dim=-1), site_axis)
    return constant_masks(mask, delta, site_axis)
