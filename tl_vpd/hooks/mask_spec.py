"""What a masked context does in every forward pass, and whether masks fit the activations of one.

A mask has one axis ``[C]`` (the same for all tokens) or all axes of the activations, ``[batch or 1, pos or 1, C]``. Two axes of
three are refused: ``[batch, C]`` and ``[pos, C]`` look the same where a batch has as many rows as positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_vpd.hooks.positions import Positions, axis_positions, checked_positions
from tl_vpd.masking import Masks, SiteMask
from tl_vpd.masking.masks import check_factors
from tl_vpd.masking.modes import NEED_IMPORTANCES, Mode, ModeOptions
from tl_vpd.site import ConcatenatedAxis

MaskFunction = Callable[[str, Tensor], Tensor | SiteMask]
"""Takes a site's name and its inner activations ``[batch, pos, C]``; returns their mask."""


@dataclass(frozen=True, eq=False)
class MaskSpec:
    """What a masked context does in every forward pass.

    Attributes:
        mode: a mode (None: ``masks``).
        masks: masks by site, or a function that makes them in each pass.
        sites: the sites that are masked.
        options: of the mode.
        generator: of the mode's random numbers (None: torch's global one).
        pos: the positions that are masked (None: all).
        node_set: indices by site that have importance 1 where all others have 0, instead of Γ's importances (None: Γ's).
    """

    mode: Mode | None
    masks: Masks | MaskFunction | None
    sites: frozenset[str]
    options: ModeOptions = field(default_factory=ModeOptions)
    generator: torch.Generator | None = None
    pos: Positions = None
    node_set: Mapping[str, tuple[int, ...]] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "pos", checked_positions(self.pos))

    @property
    def needs_clean_pass(self) -> bool:
        """Whether a clean pass has to come first: for Γ's importances, or for the target of an attack."""
        return self.mode == "adversarial" or (self.mode in NEED_IMPORTANCES and self.node_set is None)

    def indicator(
        self, like: Float[Tensor, "*batch C_total"], site_axis: ConcatenatedAxis
    ) -> Float[Tensor, "*batch C_total"]:
        """Importances of 1 for the node set and 0 for the rest."""
        assert self.node_set is not None
        g = torch.zeros_like(like)
        for name, indices in self.node_set.items():
            if name in site_axis.slices:
                g[..., [site_axis.slices[name].start + i for i in indices]] = 1.0
        return g

    def limited(
        self,
        name: str,
        mask: SiteMask,
        acts: Float[Tensor, "*batch C"],
        token_mask: Bool[Tensor, "batch pos"] | None = None,
    ) -> SiteMask:
        """The mask at the spec's positions only, and (of a mode) at real tokens only; elsewhere the site runs as the target."""
        if self.mode is not None and token_mask is not None:
            mask = mask.also_routed(token_mask[:, -acts.shape[1] :])  # behind a KV cache the mask covers the prefix too
        if self.pos is None:
            return mask
        selected = axis_positions(self.pos, acts, name)
        where = torch.zeros(1, acts.shape[1], dtype=torch.bool, device=acts.device)
        where[:, selected] = True
        return mask.also_routed(where)


def unrouted(mask: SiteMask) -> SiteMask:
    """The same mask with 1 where the masked path is not computed, which is the target itself."""
    if mask.routed is None:
        return mask
    factor = None if mask.mask is None else torch.where(mask.routed[..., None], mask.mask, 1.0)
    return SiteMask(factor, None if mask.delta is None else torch.where(mask.routed, mask.delta, 1.0))


def mask_from_function(function: MaskFunction, name: str, acts: Float[Tensor, "*batch C"]) -> SiteMask:
    """What a user's function returns for one site, checked.

    Args:
        function: of the user.
        name: of the site.
        acts: its activations in this pass.

    Raises:
        TypeError: it returns neither a tensor nor a SiteMask.
        ValueError: the mask does not fit the activations, or its factors are not finite.
    """
    value = function(name, acts)
    if value is None:
        raise TypeError(
            f"The mask function returned None for {name}: return one factor per subcomponent, or SiteMask(None, None) to leave "
            "the site unmasked."
        )
    mask = SiteMask.of(value, name).fitted(name, acts.shape, acts.device)
    check_factors({name: mask})
    return mask
