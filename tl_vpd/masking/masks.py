"""Masks of all sites, and how they come from causal importances and sources.

    m = g + (1 − g) · r          a subcomponent of importance 1 is never ablated, one of importance 0 is masked by r
    m_Δ = r_Δ                    Δ's importance is 0 by definition

(VPD paper, section on masked forwards.) The concatenated axis holds all sites' subcomponents one after the other
(``tl_vpd.site.ConcatenatedAxis``); a concatenated *source* has one more entry per site behind them, for the Δs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_vpd.checks import shown
from tl_vpd.masking.factors import check_all, check_axes, factor_of
from tl_vpd.printing import Printed
from tl_vpd.site import ConcatenatedAxis, nearest, select


@dataclass(frozen=True, init=False)
class SiteMask(Printed):
    """One site's mask: one factor per subcomponent for all tokens ``[C]``, or with all axes ``[batch or 1, pos or 1, C]``.

    Args:
        mask: factor of each subcomponent (None: 1).
        delta: factor of Δ: a number for all tokens, or ``[batch or 1, pos or 1]`` (None: 1).
        routed: where the masked path is computed, ``[batch or 1, pos or 1]``; elsewhere the site runs as the target (None:
            everywhere).

    Raises:
        TypeError: something else than tensors (for ``delta``, a number; for ``routed``, of bools).
    """

    mask: Float[Tensor, "*#batch C"] | None
    delta: Float[Tensor, "*#batch"] | None
    routed: Bool[Tensor, "*#batch"] | None

    def __init__(
        self,
        mask: Float[Tensor, "*#batch C"] | None,
        delta: Float[Tensor, "*#batch"] | float | None,
        routed: Bool[Tensor, "*#batch"] | None = None,
    ) -> None:
        if delta is not None and not isinstance(delta, Tensor):
            delta = torch.tensor(factor_of("SiteMask.delta", delta), dtype=torch.float64)
        for name, value in (("mask", mask), ("delta", delta), ("routed", routed)):
            if value is not None and not isinstance(value, Tensor):
                raise TypeError(f"SiteMask.{name} is a {type(value).__name__}: give a tensor or None.")
            if name == "routed" and value is not None and value.dtype != torch.bool:
                raise TypeError(
                    f"SiteMask.routed is of {value.dtype}: give a tensor of bools, True where the mask counts."
                )
            if value is not None and (value.is_complex() or value.is_meta or value.layout != torch.strided):
                raise TypeError(
                    f"SiteMask.{name} is of {value.dtype}, {value.layout}, on {value.device}: give dense real numbers."
                )
            if name != "routed" and value is not None and not value.is_floating_point():
                value = value.double()  # integers and bools are numbers too
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, value: Any, site: str) -> SiteMask:
        """A site's mask from a ``SiteMask`` or a bare tensor of factors; raises TypeError for anything else."""
        if isinstance(value, cls):
            return value
        if isinstance(value, Tensor):
            return cls(value, None)
        raise TypeError(
            f"The mask of {site} is a {type(value).__name__}: give a tensor with one factor per subcomponent (1 leaves it "
            "unmasked), or a SiteMask(mask, delta)."
        )

    def fitted(self, name: str, shape: Sequence[int], device: torch.device) -> SiteMask:
        """The same mask on a device; raises ValueError unless it fits activations of this shape, ``[batch, pos, C]``."""
        for what, tensor, shared in (("mask", self.mask, 1), ("Δ's mask", self.delta, 0), ("routing", self.routed, 0)):
            if tensor is not None:
                check_axes(f"The {what} for {name}", tensor, shape if shared else shape[:-1], shared=shared)
        tensors = (t if t is None else t.to(device) for t in (self.mask, self.delta, self.routed))
        return SiteMask(*tensors)

    def also_routed(self, where: Bool[Tensor, "*#batch"] | None) -> SiteMask:
        """The same mask, computed only where ``where`` is True as well (None: no further limit)."""
        if where is None:
            return self
        return replace(self, routed=where if self.routed is None else where & self.routed)


class Masks(Mapping[str, SiteMask]):
    """The masks of a forward pass by site; a site that is not named runs unmasked.

    Args:
        by_site: a ``SiteMask`` or a bare tensor of factors for each site.

    Raises:
        TypeError: a mask is neither.
    """

    def __init__(self, by_site: Mapping[str, SiteMask | Tensor]) -> None:
        if not isinstance(by_site, Mapping):
            raise TypeError(f"by_site is a {type(by_site).__name__}: give masks by site, in a dict.")
        self._by_site = {name: SiteMask.of(value, name) for name, value in by_site.items()}

    def __getitem__(self, site: str) -> SiteMask:
        if site not in self._by_site:
            raise KeyError(f"There is no mask for {shown(site)}{nearest(site, self)}: {', '.join(self) or 'no site'}.")
        return self._by_site[site]

    def __contains__(self, site: object) -> bool:  # Mapping's makes the error above, for every site of every pass
        return site in self._by_site

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_site)

    def __len__(self) -> int:
        return len(self._by_site)

    def __repr__(self) -> str:
        return f"Masks({', '.join(self)})"

    @classmethod
    def of(cls, masks: Mapping[str, SiteMask | Tensor], counts: Mapping[str, int]) -> Masks:
        """Masks as a user gives them, checked as far as they can be before a pass.

        Raises:
            KeyError: a site is not decomposed.
            TypeError: a mask is neither a SiteMask nor a tensor.
            ValueError: there are no masks, one has another C than ``counts`` says, or factors are not finite.
        """
        if not masks:
            raise ValueError("There are no masks, so nothing would be masked: name one site or more.")
        for name in masks:
            if name not in counts:
                raise KeyError(f"The masks name {shown(name)}, which is not decomposed{nearest(name, counts)}.")
        result = masks if isinstance(masks, Masks) else cls(masks)
        for name, mask in result.items():
            if mask.mask is not None and (mask.mask.ndim == 0 or mask.mask.shape[-1] not in (1, counts[name])):
                raise ValueError(
                    f"The mask for {name} is {tuple(mask.mask.shape)}, and the site has {counts[name]} subcomponents: give one "
                    "factor each, on the last axis."
                )
        check_factors(result)
        return result

    def only(self, sites: str | Sequence[str] | None) -> Masks:
        """The masks of sites that match patterns (None: all) alone; raises KeyError where a pattern matches nothing."""
        return Masks({name: self[name] for name in select(sites, self)})

    def routed(self, routing: Mapping[str, Bool[Tensor, "*batch"]]) -> Masks:
        """The same masks with the masked path computed only where ``routing`` is True."""
        return Masks({name: replace(mask, routed=routing[name]) for name, mask in self._by_site.items()})

    def at_tokens(self, token_mask: Bool[Tensor, "*batch"] | None) -> Masks:
        """The same masks at real tokens; padding runs unmasked (None: no token is padding)."""
        if token_mask is None:
            return self
        return Masks({name: mask.also_routed(token_mask) for name, mask in self._by_site.items()})


def check_factors(masks: Mapping[str, SiteMask]) -> None:
    """Raises ValueError if factors are NaN, infinite or too large for half precision; waits for the device once."""
    factors = {f"The mask for {name}": mask.mask for name, mask in masks.items()}
    factors |= {f"Δ's mask for {name}": mask.delta for name, mask in masks.items()}
    check_all({what: tensor for what, tensor in factors.items() if tensor is not None})


def mask_of(g: Float[Tensor, "*batch C"], r: Float[Tensor, "*#batch C"]) -> Float[Tensor, "*batch C"]:
    """``g + (1 − g) r``: the masks of importances g and sources r."""
    return torch.lerp(r, g.new_ones(()), g)


class _FromSources(torch.autograd.Function):
    """``(g + (1 − g) r, r_Δ)``: backward in one pass over each tensor, and one gradient for the whole source."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, sources: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(g, sources)
        r, delta = sources.split([g.shape[-1], sources.shape[-1] - g.shape[-1]], dim=-1)
        return mask_of(g, r), delta.expand(*g.shape[:-1], -1).clone()

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
    """Masks ``g + (1 − g) · r`` of every site, Δ's from the last entries of the concatenated sources.

    Args:
        g: importances of all sites.
        sources: in [0, 1], Δ's behind the subcomponents'.
        site_axis: the sites on g's last axis.
        routing: by site, where the masked path is computed (None: everywhere).
    """
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
    """Masks from one concatenated tensor of factors, with one factor for every site's Δ."""
    if isinstance(delta, Tensor):
        check_axes("delta", delta, mask.shape[:-1], shared=0)
        if (delta.is_meta and not mask.is_meta) or delta.layout != torch.strided:
            raise ValueError("delta is on the meta device, without numbers, or sparse: give a plain tensor.")
    else:
        delta = factor_of("delta", delta)
        delta = torch.full((), delta, dtype=mask.dtype, device=mask.device)
    factor = delta.to(mask).expand(mask.shape[:-1])
    return Masks({name: SiteMask(site_mask, factor) for name, site_mask in site_axis.split_sites(mask).items()})
