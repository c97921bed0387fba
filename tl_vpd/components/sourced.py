"""The masked output of a training pass, with masks made from importances and sources inside the product.

    m = g + (1 − g) r,      y = b + m_Δ (y₀ − b) + (a ⊙ (m − m_Δ)) @ U,      a = x @ V

Masks are never stored: forward and backward each make them block by block, small enough to stay in the processor's cache, from
importances g and sources r, which all sites keep on one packed axis. What backward needs of a site is x, a and y₀. With the
output's gradient G, zero where a token is not routed,

    ∂coefficients = G Uᵀ,   ∂a = ∂coefficients ⊙ (m − m_Δ),   ∂m = ∂coefficients ⊙ a,   ∂m_Δ = Σ G (y₀ − b) − Σ_c ∂m
    ∂g = ∂m (1 − r),        ∂r = ∂m (1 − g)

The last line is one pass over the packed axis for all sites: every site writes its ∂m into one buffer, and a node of the graph
that runs after all of them (``_Gather``) turns it into the gradients of g and r.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from tl_vpd.site import Packing

_BLOCK = 1 << 17
"""Elements handled at once."""


class _Buffer:
    """∂m of all sites, and ∂m_Δ, of one pass; made when the first site writes."""

    def __init__(self, shape: torch.Size, n_sites: int, like: Tensor) -> None:
        self.shape, self.n_sites, self.like = shape, n_sites, like
        self.writers = 0
        self.mask: Tensor | None = None
        self.delta: Tensor | None = None

    def made(self) -> tuple[Tensor, Tensor]:
        """Both tensors; zero where no site writes."""
        if self.mask is None or self.delta is None:
            make = torch.empty if self.writers == self.n_sites else torch.zeros
            self.mask = make(self.shape, dtype=self.like.dtype, device=self.like.device)
            self.delta = make(*self.shape[:-1], self.n_sites, dtype=self.like.dtype, device=self.like.device)
        return self.mask, self.delta


class _Gather(torch.autograd.Function):
    """From g and sources to a scalar that every site takes, so that this node's backward comes after all of theirs."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, sources: Tensor, buffer: _Buffer) -> Tensor:
        ctx.save_for_backward(g, sources)
        ctx.buffer = buffer
        return g.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        g, sources = ctx.saved_tensors
        mask, delta = ctx.buffer.made()
        C = g.shape[-1]
        grad_g = torch.addcmul(mask, mask, sources[..., :C], value=-1) if ctx.needs_input_grad[0] else None
        grad_sources = None
        if ctx.needs_input_grad[1]:
            full = mask.new_empty(*g.shape[:-1], sources.shape[-1])
            torch.addcmul(mask, mask, g, value=-1, out=full[..., :C])
            full[..., C:] = delta
            grad_sources = full.sum_to_size(sources.shape)
        ctx.buffer.mask = ctx.buffer.delta = None
        return grad_g, grad_sources, None


class _Product(torch.autograd.Function):
    """One site's masked output. Rows are tokens: every tensor is ``[tokens, ...]``."""

    @staticmethod
    def forward(
        ctx: Any,
        handle: Tensor,
        y: Tensor,
        x: Tensor,
        V: Tensor,
        U: Tensor,
        bias: Tensor | None,
        g: Tensor,
        r: Tensor,
        delta: Tensor,
        routed: Tensor | None,
        where: tuple[_Buffer, slice, int],
    ) -> Tensor:
        acts = x @ V
        output = y * delta if bias is None else torch.lerp(bias.expand_as(y), y, delta)
        coefficients = torch.empty_like(acts)
        for rows in _blocks(acts):
            _difference(g[rows], r[rows], delta[rows], out=coefficients[rows]).mul_(acts[rows])
        output.addmm_(coefficients, U)
        if routed is not None:
            output = torch.where(routed, output, y)
        ctx.save_for_backward(y, x, acts, V, U, bias, g, r, delta, routed)
        ctx.where = where
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        y, x, acts, V, U, bias, g, r, delta, routed = ctx.saved_tensors
        buffer, columns, site = ctx.where
        needs = ctx.needs_input_grad
        own = grad if routed is None else grad * routed
        of_coefficients = own @ U.T
        weighted = torch.empty_like(acts) if needs[4] else None
        if needs[0]:
            mask, of_delta = buffer.made()
            mask, of_delta = mask.flatten(0, -2)[:, columns], of_delta.flatten(0, -2)[:, site]
            centred = y if bias is None else y - bias
            torch.linalg.vecdot(own, centred, out=of_delta)
        for rows in _blocks(acts):
            difference = _difference(g[rows], r[rows], delta[rows])
            if weighted is not None:
                torch.mul(acts[rows], difference, out=weighted[rows])
            if needs[0]:
                block = torch.mul(of_coefficients[rows], acts[rows], out=mask[rows])
                of_delta[rows] -= block.sum(-1)
            of_coefficients[rows].mul_(difference)  # from here on the gradient of the activations
        of_y = own * delta
        if routed is not None:
            of_y = torch.where(routed, of_y, grad)
        return (
            torch.zeros_like(delta[0, 0]) if needs[0] else None,
            of_y if needs[1] else None,
            of_coefficients @ V.T if needs[2] else None,
            x.T @ of_coefficients if needs[3] else None,
            weighted.T @ own if weighted is not None else None,
            *[None] * 6,
        )


def _blocks(tensor: Tensor) -> list[slice]:
    rows = max(1, _BLOCK // max(1, tensor.shape[1]))
    return [slice(start, start + rows) for start in range(0, len(tensor), rows)]


def _difference(g: Tensor, r: Tensor, delta: Tensor, out: Tensor | None = None) -> Tensor:
    """``g + (1 − g) r − m_Δ``."""
    one = torch.ones((), dtype=g.dtype, device=g.device)
    found = torch.lerp(r.expand_as(g), one, g) if out is None else torch.lerp(r.expand_as(g), one, g, out=out)
    return found.sub_(delta)


class SourcedPass:
    """Importances, sources and routing of one masked pass, and every site's product in it.

    Args:
        g: importances of all sites, packed. sources: in [0, 1], packed, Δ's behind (shared over tokens or one a token).
        routing: by site, where the masked path is taken (None: everywhere).
    """

    def __init__(
        self,
        g: Float[Tensor, "*batch C_total"],
        sources: Float[Tensor, "*#batch C_and_deltas"],
        packing: Packing,
        routing: Mapping[str, Bool[Tensor, "*batch"]] | None = None,
    ) -> None:
        self.g, self.sources, self.packing, self.routing = g, sources, packing, routing
        self._buffer = _Buffer(g.shape, len(packing.names), g)
        self._handle = _Gather.apply(g, sources, self._buffer)
        self._rows_g = g.detach().flatten(0, -2)
        self._rows_r = sources.detach().expand(*g.shape[:-1], -1).flatten(0, -2)

    def __contains__(self, name: str) -> bool:
        return name in self.packing.slices

    def mask(self, name: str) -> tuple[Float[Tensor, "*batch C"], Float[Tensor, "*batch"]]:
        """One site's mask and Δ's as tensors of their own, for products that are not ``product``'s."""
        columns, site = self.packing.slices[name], self.packing.names.index(name)
        g = self.g[..., columns]
        r = self.sources[..., columns].expand_as(g)
        delta = self.sources[..., self.packing.total + site].expand(g.shape[:-1])
        return torch.lerp(r, torch.ones((), dtype=g.dtype, device=g.device), g), delta

    def product(
        self,
        name: str,
        y: Float[Tensor, "*batch d_out"],
        x: Float[Tensor, "*batch d_in"],
        V: Float[Tensor, "d_in C"],
        U: Float[Tensor, "C d_out"],
        bias: Float[Tensor, " d_out"] | None,
    ) -> Float[Tensor, "*batch d_out"]:
        """The site's masked output from the output y the model computed and its input x."""
        site = self.packing.names.index(name)
        columns = self.packing.slices[name]
        self._buffer.writers += 1
        routed = None if self.routing is None else self.routing[name].reshape(-1, 1)
        rows = _Product.apply(
            self._handle,
            y.flatten(0, -2),
            x.flatten(0, -2),
            V,
            U,
            bias,
            self._rows_g[:, columns],
            self._rows_r[:, columns],
            self._rows_r[:, self.packing.total + site].unsqueeze(1),
            routed,
            (self._buffer, columns, site),
        )
        return rows.view(y.shape)
