"""Hooks that set masks: to a tensor, to a number at positions, and to what a user's function returns in each pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_vpd.hooks.mask_spec import MaskFunction, mask_from_function, unrouted
from tl_vpd.hooks.positions import Positions, axis_positions, checked_positions
from tl_vpd.masking import SiteMask
from tl_vpd.masking.factors import check_axes


@dataclass(frozen=True)
class SetTo:
    """A hook that replaces the mask by a tensor."""

    value: Float[Tensor, "*batch"] = field(repr=False)  # TransformerLens names hooks by their repr

    def __call__(self, tensor: Tensor, hook: Any) -> Tensor:
        check_axes(f"The mask for {hook.name}", self.value, tensor.shape, shared=1)
        return self.value.to(tensor).expand_as(tensor)


@dataclass(frozen=True)
class SetDelta:
    """A hook that sets Δ's factor at positions."""

    value: float
    pos: Positions

    def __post_init__(self) -> None:
        object.__setattr__(self, "pos", checked_positions(self.pos))

    def __call__(self, tensor: Float[Tensor, "batch *pos 1"], hook: Any) -> Float[Tensor, "batch *pos 1"]:
        """Δ's factors with those of the positions set."""
        if self.pos is None:
            return torch.full_like(tensor, self.value)
        return tensor.index_fill(1, axis_positions(self.pos, tensor, hook.name), self.value)


class Computed:
    """Three hooks that call a function ``(site, acts) -> mask`` once in each pass and set the mask it returns."""

    def __init__(self, site: str, function: MaskFunction) -> None:
        self.site, self.function = site, function
        self._mask = SiteMask(None, None)

    def acts(self, tensor: Tensor, hook: Any) -> None:
        """On ``component_acts``: computes the masks."""
        self._mask = unrouted(mask_from_function(self.function, self.site, tensor))

    def mask(self, tensor: Tensor, hook: Any) -> Tensor:
        """On ``mask``: sets it."""
        return tensor if self._mask.mask is None else self._mask.mask.to(tensor).expand_as(tensor)

    def delta(self, tensor: Tensor, hook: Any) -> Tensor:
        """On ``delta_mask``: sets it."""
        return tensor if self._mask.delta is None else self._mask.delta.unsqueeze(-1).to(tensor).expand_as(tensor)
