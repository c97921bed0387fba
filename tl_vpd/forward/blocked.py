"""The masked product of a training pass, with masks made block by block inside it.

    m = g + (1 − g) r,      y = b + m_Δ (y₀ − b) + (a ⊙ (m − m_Δ)) @ U,      a = x @ V          (VPD paper, section 2)

Masks are never stored: forward and backward each make them in blocks that fit in the processor's cache, from sources r and from
importances g (or the pre-sigmoid values of g), which all sites store on one concatenated axis. With the output's gradient G,

    ∂coefficients = G Uᵀ,   ∂a = ∂coefficients ⊙ (m − m_Δ),   ∂m = ∂coefficients ⊙ a,   ∂m_Δ = Σ G (y₀ − b) − Σ_c ∂m
    ∂g = ∂m (1 − r),        ∂r = ∂m (1 − g)

Products are carried out in the precision of y₀ (under autocast lower than that of V, U, g and r, where gradients return).
Only routed tokens are computed: elsewhere the output is y₀ and gradients pass to it. ∂g and ∂r do not travel through autograd:
each block adds to, or writes into, two concatenated tensors of all sites (``grad_g``, ``grad_sources``), so that no
tensor of the size of ∂m is ever made (``tl_vpd.forward.site_columns``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from tl_vpd.forward.site_columns import Rows, SiteColumns
from tl_vpd.importance.squash import Squash
from tl_vpd.masking.routing import Routing
from tl_vpd.site import ConcatenatedAxis

BLOCK = 1 << 16
"""Elements of a mask made at once."""
ALL = slice(None)


class BlockedMasks:
    """Importances, sources and routing of one masked pass, and every site's product in it (a ``PassMasks``).

    Args:
        values: importances of all sites, concatenated; or, with ``squash``, the pre-sigmoid values they are made from.
        sources: in [0, 1], concatenated, Δ's behind.
        site_axis: the sites on the last axis.
        routing: where the masked path is computed (None: everywhere).
        source_rows: the row of the sources that each token uses, tokens in the order of the values' rows (None: the same row).
        grad_g: where backward adds the gradient of the importances (None: it is not computed).
        grad_sources: where backward leaves the gradient of the sources: zero at the start, and right after one backward (None: it
            is not computed).
        attacked: the first rows of the batch, whose sources get a gradient; ``grad_sources`` is then of the sources that they
            use, which are the first ones (None: all rows).
        sites: the sites that are masked (None: all).
        squash: makes importances from pre-sigmoid values in each product, so that no tensor of them is stored (None: the values
            are importances); ``grad_g`` is the gradient of the importances all the same.

    Values and sources are constants to autograd. Attribute ``handle``: a scalar on which every site's output depends, for
    ``torch.autograd.grad`` where V and U are constant; its gradient is None and means nothing.
    """

    def __init__(
        self,
        values: Float[Tensor, "*batch C_total"],
        sources: Float[Tensor, "rows C_and_deltas"],
        site_axis: ConcatenatedAxis,
        routing: Routing | None = None,
        *,
        source_rows: Int[Tensor, " tokens"] | None = None,
        grad_g: Float[Tensor, "*batch C_total"] | None = None,
        grad_sources: Float[Tensor, "first C_and_deltas"] | None = None,
        attacked: int | None = None,
        sites: Collection[str] | None = None,
        squash: Squash | None = None,
    ) -> None:
        self.sites = site_axis.slices.keys() if sites is None else sites
        self.site_axis, self.routing, self.source_rows = site_axis, routing, source_rows
        self.batch, self.attacked = values.shape[:-1], attacked
        self.values, self.squash, self.sources = values.detach().flatten(0, -2), squash, sources.detach()
        self.grad_g = None if grad_g is None else grad_g.flatten(0, -2)
        self.grad_sources = grad_sources
        self.handle = torch.zeros((), dtype=values.dtype, device=values.device)
        self.handle.requires_grad_(grad_g is not None or grad_sources is not None)

    def __contains__(self, name: str) -> bool:
        return name in self.sites

    def columns(self, name: str) -> SiteColumns:
        """One site's columns of the concatenated tensors."""
        at, delta = self.site_axis.slices[name], self.site_axis.total + self.site_axis.names.index(name)
        return SiteColumns(
            self.values[:, at],
            self.sources[:, at],
            self.sources[:, delta : delta + 1],
            source_rows=self.source_rows,
            squash=self.squash,
            grad_g=None if self.grad_g is None else self.grad_g[:, at],
            grad_sources=None if self.grad_sources is None else (self.grad_sources[:, at], self.grad_sources[:, delta]),
        )

    def mask(self, name: str) -> tuple[Float[Tensor, "*batch C"], Float[Tensor, "*batch"]]:
        """One site's mask and Δ's as whole tensors, for layouts that ``product`` does not compute."""
        n = None if self.attacked is None else self.attacked * self.batch[1:].numel()
        mask, delta = _WholeMask.apply(self.handle, self.columns(name), n)
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
        """The site's masked output from the output y that the model computed and its input x."""
        routed = None if self.routing is None else self.routing.tokens[name]
        n = self.attacked
        if n is not None:
            n = n * self.batch[1:].numel() if self.routing is None else self.routing.counts_of([name], slice(n))[0]
        flat = y.flatten(0, -2), x.flatten(0, -2)
        output: Tensor = _BlockedProduct.apply(self.handle, *flat, V, U, bias, routed, self.columns(name), n)
        return output.view(y.shape)


class _BlockedProduct(torch.autograd.Function):
    """One site's masked output. Tensors are ``[tokens, ...]``; ``routed`` are the indices of the masked tokens (None: all), of
    which the first n are attacked (None: all)."""

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
        columns: SiteColumns,
        n: int | None,
    ) -> Tensor:
        rows: Rows = ALL if routed is None else routed
        low, ctx.x_dtype = y.dtype, x.dtype
        x, bias = x.to(low), None if bias is None else bias.to(low)
        y_rows, x_rows = (y, x) if routed is None else (y[routed], x[routed])
        acts, delta = x_rows @ V.to(low), columns.delta(rows).to(low)
        output = y_rows * delta if bias is None else torch.lerp(bias, y_rows, delta)
        coefficients = torch.empty_like(acts)
        for block, at in _blocks(acts, routed):
            torch.mul(columns.difference(at), acts[block], out=coefficients[block])
        output.addmm_(coefficients, U.to(low))
        # V and U as they are stored, not their casts: where they are sharded, only these are freed after forward.
        ctx.save_for_backward(y if columns.grad_sources is not None else None, x, acts, V, U, bias, routed)
        ctx.columns, ctx.n = columns, n
        return output if routed is None else y.index_copy(0, routed, output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        y, x, acts, V, U, bias, routed = ctx.saved_tensors
        columns, (_, y_needs, x_needs, V_needs, U_needs, *_) = ctx.columns, ctx.needs_input_grad
        rows: Rows = ALL if routed is None else routed
        low, full = grad.dtype, columns.values.dtype
        grad_rows, delta = grad[rows], columns.delta(rows)
        grad_acts = grad_rows @ U.to(low).T  # the gradient of coefficients; the loop makes it that of activations
        coefficients = torch.empty_like(acts) if U_needs else None
        grad_delta = None
        if columns.grad_sources is not None:
            centred = y[rows] if bias is None else y[rows] - bias
            grad_delta = torch.linalg.vecdot(grad_rows.to(full), centred.to(full))
        for block, at in _blocks(acts, routed):
            difference = columns.difference(at)
            if coefficients is not None:
                torch.mul(acts[block], difference, out=coefficients[block])
            if columns.needs_gradients:
                grad_mask = grad_acts[block].to(full) * acts[block].to(full)
                columns.add_mask_gradient(at, grad_mask, _inside(block, ctx.n))
                if grad_delta is not None:
                    grad_delta[block] -= grad_mask.sum(-1)
            grad_acts[block].mul_(difference)
        if grad_delta is not None:
            columns.add_delta_gradient(rows, grad_delta, ctx.n)
        grad_y = grad_x = None
        if y_needs:
            grad_y = grad_rows * delta.to(low)
            grad_y = grad_y if routed is None else grad.index_copy(0, routed, grad_y)
        if x_needs:
            grad_x = grad_acts @ V.to(low).T
            grad_x = grad_x if routed is None else torch.zeros_like(x).index_copy_(0, routed, grad_x)
        return (
            None,
            grad_y,
            None if grad_x is None else grad_x.to(ctx.x_dtype),
            (x[rows].T @ grad_acts).to(V) if V_needs else None,
            None if coefficients is None else (coefficients.T @ grad_rows).to(U),
            *[None] * 4,
        )


class _WholeMask(torch.autograd.Function):
    """A site's mask and Δ's, whose gradients go where those of ``_BlockedProduct`` go."""

    @staticmethod
    def forward(ctx: Any, handle: Tensor, columns: SiteColumns, n: int | None) -> tuple[Tensor, Tensor]:
        ctx.columns, ctx.n = columns, n
        return columns.mask(ALL), columns.delta(ALL).squeeze(1).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mask: Tensor, grad_delta: Tensor) -> tuple[None, None, None]:  # type: ignore[override]
        ctx.columns.add_mask_gradient(ALL, grad_mask, ctx.n)
        ctx.columns.add_delta_gradient(ALL, grad_delta, ctx.n)
        return None, None, None


def _inside(block: slice, n: int | None) -> int | None:
    """How many tokens of a block are among the first n (None: all)."""
    return None if n is None else min(max(n - block.start, 0), block.stop - block.start)


def _blocks(acts: Tensor, routed: Tensor | None) -> Iterator[tuple[slice, Rows]]:
    """Blocks of the rows of ``acts``, and the tokens that they are of."""
    n = max(1, BLOCK // max(1, acts.shape[1]))
    for start in range(0, len(acts), n):
        block = slice(start, start + n)
        yield block, block if routed is None else routed[block]
