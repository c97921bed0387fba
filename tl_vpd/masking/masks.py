"""Masks of all sites, and how they come from causal importances and sources.

    m = g + (1 − g) · r          a subcomponent of importance 1 is never ablated, one of importance 0 is masked by r
    m_Δ = r_Δ                    Δ's importance is 0 by definition

The concatenated axis holds all sites' subcomponents one after the other (``tl_vpd.site.ConcatenatedAxis``); a concatenated *source* has one
more entry a site behind them, for the Δs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_vpd.site import ConcatenatedAxis


@dataclass(frozen=True)
class SiteMask:
    """One site's mask.

    ``mask``: factor of each subcomponent (None: 1). ``delta``: factor of Δ (None: 1). ``routed``: where the masked path is
    taken at all (None: everywhere).
    """

    mask: Float[Tensor, "*#batch C"] | None
    delta: Float[Tensor, "*#batch"] | None
    routed: Bool[Tensor, "*#batch"] | None = None


class Masks(Mapping[str, SiteMask]):
    """The masks of a forward pass by site; a site that is not named runs unmasked."""

    def __init__(self, by_site: Mapping[str, SiteMask]) -> None:
        self._by_site = dict(by_site)

    def __getitem__(self, site: str) -> SiteMask:
        return self._by_site[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_site)

    def __len__(self) -> int:
        return len(self._by_site)

    def __repr__(self) -> str:
        return f"Masks({', '.join(self)})"

    def only(self, sites: list[str]) -> Masks:
        """The masks of these sites alone; the others run unmasked."""
        return Masks({name: self[name] for name in sites})

    def routed(self, routing: Mapping[str, Bool[Tensor, "*batch"]]) -> Masks:
        """The same masks with the masked path taken only where ``routing`` is True."""
        return Masks({name: replace(own, routed=routing[name]) for name, own in self._by_site.items()})


class _FromSources(torch.autograd.Function):
    """``(g + (1 − g) r, r_Δ)``: backward in one pass a tensor, and one gradient for the whole source."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, sources: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(g, sources)
        r, delta = sources.split([g.shape[-1], sources.shape[-1] - g.shape[-1]], dim=-1)
        one = torch.ones((), dtype=g.dtype, device=g.device)
        return torch.lerp(r, one, g), delta.expand(*g.shape[:-1], -1).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_delta: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        g, sources = ctx.saved_tensors
        C = g.shape[-1]
        grad_g = torch.addcmul(grad, grad, sources[..., :C], value=-1) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_g, None
        full = grad.new_empty(*g.shape[:-1], sources.shape[-1])
        torch.addcmul(grad, grad, g, value=-1, out=full[..., :C])
        full[..., C:] = grad_delta
        return grad_g, full.sum_to_size(sources.shape)


def masks_from_sources(
    g: Float[Tensor, "*batch C_total"],
    sources: Float[Tensor, "*#batch C_and_deltas"],
    site_axis: ConcatenatedAxis,
    routing: Mapping[str, Bool[Tensor, "*batch"]] | None = None,
) -> Masks:
    """Masks ``g + (1 − g) · r`` of every site, Δ's from the last entries of the concatenated sources."""
    mask, delta = _FromSources.apply(g, sources)
    by_site, deltas = site_axis.split_sites(mask), delta.unbind(-1)
    return Masks(
        {
            name: SiteMask(by_site[name], deltas[i], None if routing is None else routing[name])
            for i, name in enumerate(site_axis.names)
        }
    )


def constant_masks(
    mask: Float[Tensor, "*batch C_total"], delta: float | Float[Tensor, "*#batch"], site_axis: ConcatenatedAxis
) -> Masks:
    """Masks given outright, with one factor for every site's Δ."""
    factor = torch.as_tensor(delta, dtype=mask.dtype, device=mask.device).expand(mask.shape[:-1])
    return Masks({name: SiteMask(own, factor) for name, own in site_axis.split_sites(mask).items()})
