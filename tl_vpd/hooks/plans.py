"""What a masked context asks of every forward pass, and whether given masks fit one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tl_vpd.hooks.modes import NEED_IMPORTANCES, Delta, Mode
from tl_vpd.masking import Masks, SiteMask

MaskFunction = Callable[[str, Tensor], Tensor | SiteMask]
"""Takes a site's name and its inner activations ``[batch, pos, C]``; gives their mask."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What a masked context asks of every forward pass."""

    mode: Mode | None
    masks: Masks | MaskFunction | None
    sites: frozenset[str]
    threshold: float
    delta: Delta
    generator: torch.Generator | None
    steps: int
    step_size: float | None

    @property
    def needs_importances(self) -> bool:
        """Whether a clean pass has to come first."""
        return self.mode in NEED_IMPORTANCES


def check_mask(name: str, own: SiteMask, acts: Tensor) -> None:
    """Raises ValueError unless the site's mask broadcasts to its activations ``[batch, pos, C]``."""
    for what, given, wanted in (("mask", own.mask, acts.shape), ("Δ's mask", own.delta, acts.shape[:-1])):
        if given is None:
            continue
        try:
            fits = torch.broadcast_shapes(given.shape, wanted) == wanted
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"The {what} for {name} is {tuple(given.shape)}, this forward pass needs {tuple(wanted)}: masks belong to the "
                "prompt they were made for. Give a function (site, acts) -> mask where the length changes."
            )
