"""The masked output of a training pass, with masks made from importances and sources inside the product.

    m = g + (1 − g) r,      y = b + m_Δ (y₀ − b) + (a ⊙ (m − m_Δ)) @ U,      a = x @ V

Masks are never stored: forward and backward each make them block by block, small enough to stay in the processor's cache, from
sources r and from importances g or the pre-sigmoid values they come from, which all sites keep on one concatenated axis. What backward
needs of a site is x, a and y₀. With the output's gradient G,

    ∂coefficients = G Uᵀ,   ∂a = ∂coefficients ⊙ (m − m_Δ),   ∂m = ∂coefficients ⊙ a,   ∂m_Δ = Σ G (y₀ − b) − Σ_c ∂m
    ∂g = ∂m (1 − r),        ∂r = ∂m (1 − g)

Products are carried out in the precision of y₀ (under autocast lower than that of V, U, g and r, where gradients return).
Only routed tokens are computed: elsewhere the output is y₀ and gradients pass to it. ∂g and ∂r do not travel through autograd:
each block adds to, or writes into, two concatenated tensors that all sites share (``grad_g``, ``grad_sources``), so that neither ∂m
nor any other tensor of their size is ever made.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from tl_vpd.importance.squash import importances_of
from tl_vpd.site import ConcatenatedAxis

_BLOCK = 1 << 16
"""Elements handled at once."""

Rows = slice | Tensor


class _Columns:
    """One site's columns of a pass: importances, sources, Δ's source, and where their gradients go. Rows are tokens."""

    def __init__(self, run: BlockedMasks, name: str) -> None:
        columns, site = run.site_axis.slices[name], run.site_axis.names.index(name)
        delta = run.site_axis.total + site
        self.values, self.forward_slope = run.values[:, columns], run.forward_slope
        self.r, self.own_delta = run.sources[:, columns], run.sources[:, delta : delta + 1]
        self.taken, self.one = run.taken, run.one
        self.grad_g = None if run.grad_g is None else run.grad_g[:, columns]
        self.grad_r = self.grad_delta = None
        if run.grad_sources is not None:
            self.grad_r, self.grad_delta = run.grad_sources[:, columns], run.grad_sources[:, delta]

    @property
    def wanted(self) -> bool:
        """Whether anybody waits for ∂g or ∂r."""
        return self.grad_g is not None or self.grad_r is not None

    def g(self, rows: Rows) -> Float[Tensor, "some C"]:
        """The importances of some tokens."""
        values = self.values[rows]
        return values if self.forward_slope is None else importances_of(values, self.forward_slope)

    def sources(self, rows: Rows) -> Float[Tensor, "some C"]:
        """The sources that some tokens take."""
        return self.r[rows] if self.taken is None else self.r[self.taken[rows]]

    def delta(self, rows: Rows) -> Float[Tensor, "some 1"]:
        """Δ's masks of some tokens."""
        return self.own_delta[rows] if self.taken is None else self.own_delta[self.taken[rows]]

    def mask(self, rows: Rows) -> Float[Tensor, "some C"]:
        """``g + (1 − g) r`` of some tokens."""
        return torch.lerp(self.sources(rows), self.one, self.g(rows))

    def difference(self, rows: Rows) -> Float[Tensor, "some C"]:
        """``g + (1 − g) r − m_Δ`` of some tokens."""
        return self.mask(rows).sub_(self.delta(rows))

    def take(self, rows: Rows, of_mask: Float[Tensor, "some C"]) -> None:
        """Hands ∂m of some tokens on to ∂g and ∂r."""
        if self.grad_g is not None:
            if isinstance(rows, slice):
                self.grad_g[rows].add_(of_mask).addcmul_(of_mask, self.sources(rows), value=-1)
            else:
                self.grad_g.index_add_(0, rows, torch.addcmul(of_mask, of_mask, self.sources(rows), value=-1))
        if self.grad_r is not None:
            if isinstance(rows, slice) and self.taken is None:
                own, share = _inside(rows, of_mask, len(self.grad_r))
                torch.addcmul(share, share, self.g(own), value=-1, out=self.grad_r[own])
            else:
                self._add(self.grad_r, rows, torch.addcmul(of_mask, of_mask, self.g(rows), value=-1))

    def take_delta(self, rows: Rows, of_delta: Float[Tensor, " some"]) -> None:
        """Hands ∂m_Δ of some tokens on."""
        if self.grad_delta is not None:
            self._add(self.grad_delta, rows, of_delta)

    def _add(self, target: Tensor, rows: Rows, share: Tensor) -> None:
        """Adds to the rows that tokens have taken; those past the end of ``target`` want no gradient."""
        taken = rows if self.taken is None else self.taken[rows]
        if len(target) < len(self.r):
            taken, share = _inside(taken, share, len(target))
        if self.taken is not None and isinstance(taken, Tensor):
            target.index_add_(0, taken, share)
        else:
            target[taken] = share


def _inside(rows: Rows, share: Tensor, n: int) -> tuple[Rows, Tensor]:
    """Those rows that are among the first n, and their share."""
    if isinstance(rows, Tensor):
        inside = rows < n
        return rows[inside], share[inside]
    start = rows.start or 0
    stop = max(start, n if rows.stop is None else min(rows.stop, n))
    return slice(start, stop), share[: stop - start]


class _Product(torch.autograd.Function):
    """One site's masked output. Every tensor is ``[tokens, ...]``; ``routed`` are the numbers of the masked ones."""

    @staticmethod
    def forward(
        ctx: Any,
        handle: Tensor,
        y: Tensor,
        x: Tensor,
        V: Tensor,
        U: Tensor,
        bias: Tensor | None,
        routed: Tensor | None,
        of: _Columns,
    ) -> Tensor:
        every: Rows = slice(None) if routed is None else routed
        kind, ctx.kinds = y.dtype, (x.dtype, V.dtype, U.dtype)
        x, V, U = x.to(kind), V.to(kind), U.to(kind)
        bias = None if bias is None else bias.to(kind)
        own_x, own_y = (x, y) if routed is None else (x[routed], y[routed])
        acts, delta = own_x @ V, of.delta(every).to(kind)
        output = own_y * delta if bias is None else torch.lerp(bias, own_y, delta)
        coefficients = torch.empty_like(acts)
        for block, rows in _blocks(acts, routed):
            torch.mul(of.difference(rows), acts[block], out=coefficients[block])
        output.addmm_(coefficients, U)
        # y is only asked for Δ's mask.
        ctx.save_for_backward(y if of.grad_delta is not None else None, x, acts, V, U, bias, routed)
        ctx.of = of
        return output if routed is None else y.index_copy(0, routed, output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        y, x, acts, V, U, bias, routed = ctx.saved_tensors
        of, needs = ctx.of, ctx.needs_input_grad
        of_x_kind, of_V_kind, of_U_kind = ctx.kinds
        every: Rows = slice(None) if routed is None else routed
        own, delta, full = grad[every], of.delta(every), of.values.dtype
        of_coefficients = own @ U.T
        weighted = torch.empty_like(acts) if needs[4] else None
        of_delta = None
        if of.grad_delta is not None:
            centred = y[every] if bias is None else y[every] - bias
            of_delta = torch.linalg.vecdot(own.to(full), centred.to(full))
        for block, rows in _blocks(acts, routed):
            difference = of.difference(rows)
            if weighted is not None:
                torch.mul(acts[block], difference, out=weighted[block])
            if of.wanted:
                of_mask = of_coefficients[block].to(full) * acts[block].to(full)
                of.take(rows, of_mask)
                if of_delta is not None:
                    of_delta[block] -= of_mask.sum(-1)
            of_coefficients[block].mul_(difference)  # from here on the gradient of the activations
        if of_delta is not None:
            of.take_delta(every, of_delta)
        of_y = of_x = None
        if needs[1]:
            of_y = own * delta.to(own.dtype)
            of_y = of_y if routed is None else grad.index_copy(0, routed, of_y)
        if needs[2]:
            of_x = of_coefficients @ V.T
            of_x = (of_x if routed is None else torch.zeros_like(x).index_copy_(0, routed, of_x)).to(of_x_kind)
        return (
            None,
            of_y,
            of_x,
            (x[every].T @ of_coefficients).to(of_V_kind) if needs[3] else None,
            (weighted.T @ own).to(of_U_kind) if weighted is not None else None,
            *[None] * 3,
        )


class _Mask(torch.autograd.Function):
    """A site's mask and Δ's as tensors, whose gradients go where ``_Product``'s go."""

    @staticmethod
    def forward(ctx: Any, handle: Tensor, of: _Columns) -> tuple[Tensor, Tensor]:
        ctx.of = of
        return of.mask(slice(None)), of.delta(slice(None)).squeeze(1).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_mask: Tensor, of_delta: Tensor) -> tuple[None, None]:  # type: ignore[override]
        ctx.of.take(slice(None), of_mask)
        ctx.of.take_delta(slice(None), of_delta)
        return None, None


def _blocks(acts: Tensor, routed: Tensor | None) -> Iterator[tuple[slice, Rows]]:
    """Blocks of the rows of ``acts``, and which rows of the pass they are."""
    rows = max(1, _BLOCK // max(1, acts.shape[1]))
    for start in range(0, len(acts), rows):
        block = slice(start, start + rows)
        yield block, block if routed is None else routed[block]


class BlockedMasks:
    """Importances, sources and routing of one masked pass, and every site's product in it.

    Args:
        values: importances of all sites, concatenated; or, with ``forward_slope``, the pre-sigmoid values they are made from.
        sources: in [0, 1], concatenated, Δ's behind.
        routing: by site, where the masked path is taken (None: everywhere).
        taken: which row of the sources each token takes, tokens in the order of the values' rows (None: each its own).
        grad_g: where backward adds the importances' gradient (None: it is not wanted).
        grad_sources: where backward leaves the gradient of the sources, or of the first of them: zero at the start, and right
            after one backward (None: it is not wanted).
        sites: the sites that are masked (None: all).
        forward_slope: of importances below 0, where each product makes them from pre-sigmoid values (None: importances are
            given). No tensor of importances is kept then; ``grad_g`` is their gradient all the same.

    Values and sources are constants to autograd. Attribute ``handle``: a scalar on which every site's output depends, for
    ``torch.autograd.grad`` where neither V nor U wants gradients; its own gradient is None and means nothing.
    """

    def __init__(
        self,
        values: Float[Tensor, "*batch C_total"],
        sources: Float[Tensor, "rows C_and_deltas"],
        site_axis: ConcatenatedAxis,
        routing: Mapping[str, Bool[Tensor, "*batch"]] | None = None,
        *,
        taken: Int[Tensor, " tokens"] | None = None,
        grad_g: Float[Tensor, "*batch C_total"] | None = None,
        grad_sources: Float[Tensor, "some C_and_deltas"] | None = None,
        sites: Collection[str] | None = None,
        forward_slope: float | None = None,
    ) -> None:
        self.sites = site_axis.slices.keys() if sites is None else sites
        self.site_axis, self.routing, self.taken = site_axis, routing, taken
        self.batch = values.shape[:-1]
        self.values, self.forward_slope, self.sources = values.detach().flatten(0, -2), forward_slope, sources.detach()
        self.grad_g = None if grad_g is None else grad_g.flatten(0, -2)
        self.grad_sources = grad_sources
        self.one = values.new_ones(())
        self.handle = torch.zeros((), dtype=values.dtype, device=values.device)
        self.handle.requires_grad_(grad_g is not None or grad_sources is not None)

    def __contains__(self, name: str) -> bool:
        return name in self.sites

    def mask(self, name: str) -> tuple[Float[Tensor, "*batch C"], Float[Tensor, "*batch"]]:
        """One site's mask and Δ's as tensors of their own, for products that are not ``product``'s."""
        mask, delta = _Mask.apply(self.handle, _Columns(self, name))
        return mask.view(*self.batch, -1), delta.view(self.batch)

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
        routed = None if self.routing is None else self.routing[name].reshape(-1).nonzero().squeeze(1)
        own = _Columns(self, name)
        rows = _Product.apply(self.handle, y.flatten(0, -2), x.flatten(0, -2), V, U, bias, routed, own)
        return rows.view(y.shape)
