"""What a masked context asks of every forward pass, and whether given masks fit one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from tl_vpd.hooks.sparse import Positions, rows_of
from tl_vpd.masking import Masks, SiteMask
from tl_vpd.masking.modes import NEED_IMPORTANCES, Delta, Mode
from tl_vpd.site import ConcatenatedAxis

MaskFunction = Callable[[str, Tensor], Tensor | SiteMask]
"""Takes a site's name and its inner activations ``[batch, pos, C]``; gives their mask."""


@dataclass(frozen=True, eq=False)
class MaskSpec:
    """What a masked context asks of every forward pass.

    ``node_set``: indices by site that have importance 1 where all others have 0, in the place of Γ's importances (None: Γ's).
    """

    mode: Mode | None
    masks: Masks | MaskFunction | None
    sites: frozenset[str]
    threshold: float = 0.0
    delta: Delta = None
    generator: torch.Generator | None = None
    steps: int = 20
    step_size: float | None = None
    pos: Positions = None
    node_set: Mapping[str, tuple[int, ...]] | None = None

    @property
    def needs_importances(self) -> bool:
        """Whether Γ has to be asked first."""
        return self.mode in NEED_IMPORTANCES and self.node_set is None

    @property
    def needs_clean_pass(self) -> bool:
        """Whether a clean pass has to come first."""
        return self.needs_importances or self.mode == "adversarial"

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

    def routed(self, name: str, like: Float[Tensor, "*batch C"]) -> Tensor | None:
        """Where the masked path is taken: at the plan's positions (None: everywhere)."""
        if self.pos is None:
            return None
        if like.ndim < 3:
            raise IndexError(f"pos={self.pos} was given, and the activations of {name} have no positions.")
        at = torch.zeros(1, like.shape[1], dtype=torch.bool, device=like.device)
        at[:, rows_of(self.pos, like.shape[1], like.device, name)] = True
        return at

    def at_positions(self, name: str, own: SiteMask, like: Float[Tensor, "*batch C"]) -> SiteMask:
        """The mask taken at the plan's positions alone, and there where its own routing says."""
        at = self.routed(name, like)
        if at is None:
            return own
        return replace(own, routed=at if own.routed is None else at & own.routed)


def unrouted(own: SiteMask) -> SiteMask:
    """The same mask with 1 where the masked path is not taken, which is the target itself."""
    if own.routed is None:
        return own
    mask = None if own.mask is None else torch.where(own.routed[..., None], own.mask, 1.0)
    return SiteMask(mask, None if own.delta is None else torch.where(own.routed, own.delta, 1.0))


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
