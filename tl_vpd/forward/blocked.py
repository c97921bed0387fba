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

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from tl_vpd.forward.mask_inputs import MaskInputs
from tl_vpd.forward.site_columns import ALL, Rows, SiteColumns
from tl_vpd.importance.squash import Squash
from tl_vpd.site import ConcatenatedAxis

BLOCK = 1 << 17
"""Elements of a mask made at once."""


class BlockedMasks:
    """Importances, sources and routing of one masked pass, and every site's product in it (a ``PassMasks``).

    Args:
        values: importances of all sites, concatenated; or, with ``squash``, the pre-sigmoid values they are made from.
        inputs: sources, routing, and which sites are masked. With ``attacked``, ``grad_sources`` is of the sources that the
            attacked rows use, which are the first ones.
        site_axis: the sites on the last axis.
        grad_g: where backward adds the gradient of the importances (None: it is not computed).
        grad_sources: where backward leaves the gradient of the sources: zero at the start, and right after one backward (None: it
            is not computed).
        squash: makes importances from pre-sigmoid values in each product, so that no tensor of them is stored (None: the values
            are importances); ``grad_g`` is the gradient of the importances all the same.

    Values and sources are constants to autograd. Attribute ``handle``: a scalar on which every site's output depends, for
    ``torch.autograd.grad`` where V and U are constant; its gradient is None and means nothing.
    """

    def __init__(
        self,
        values: Float[Tensor, "*batch C_total"],
        inputs: MaskInputs,
        site_axis: ConcatenatedAxis,
        *,
        grad_g: Float[Tensor, "*batch C_total"] | None = None,
        grad_sources: Float[Tensor, "first C_and_deltas"] | None = None,
        squash: Squash | None = None,
    ) -> None:
        self.sites = site_axis.slices.keys() if inputs.sites is None else inputs.sites
        self.batch, self.inputs, self.routing = values.shape[:-1], inputs, inputs.routing
        self.squash, self.one = squash, values.new_ones(())
        self.handle = torch.zeros((), dtype=values.dtype, device=values.device)
        self.handle.requires_grad_(grad_g is not None or grad_sources is not None)
        none = dict.fromkeys(site_axis.names)
        self._values = site_axis.split_sites(values.detach().flatten(0, -2))
        self._sources = _with_deltas(inputs.sources.detach(), site_axis)
        self._grad_g = none if grad_g is None else site_axis.split_sites(grad_g.flatten(0, -2))
        self._grad_sources = none if grad_sources is None else _with_deltas(grad_sources, site_axis)

    def __contains__(self, name: str) -> bool:
        return name in self.sites

    def columns(self, name: str) -> SiteColumns:
        """One site's columns of the concatenated tensors."""
        return SiteColumns(
            self._values[name],
            *self._sources[name],
            one=self.one,
            source_rows=self.inputs.source_rows,
            squash=self.squash,
            grad_g=self._grad_g[name],
            grad_sources=self._grad_sources[name],
        )

    def mask(self, name: str) -> tuple[Float[Tensor, "*batch C"], Float[Tensor, "*batch"]]:
        """One site's mask and Δ's as whole tensors, for layouts that ``product`` does not compute."""
        n = None if self.inputs.attacked is None else self.inputs.attacked * self.batch[1:].numel()
        mask, delta = _WholeMask.apply(self.handle, self.columns(name), n)
        return mask.view(*self.batch, -1), delta.view(self.batch)

    def product(
        self,
        name: str,
        y: Float[Tensor, "*y"],
        x: Float[Tensor, "*x"],
        V: Float[Tensor, "d_in C"],
        U: Float[Tensor, "C d_out"],
        bias: Float[Tensor, " d_out"] | None,
    ) -> Float[Tensor, "*y"]:
        """The site's masked output from the output y that the model computed and its input x, both with or without heads."""
        routed = None if self.routing is None else self.routing.tokens[name]
        n = self.inputs.attacked
        if n is not None:
            n = n * self.batch[1:].numel() if self.routing is None else self.routing.counts_of([name], slice(n))[0]
        output: Tensor = _BlockedProduct.apply(self.handle, y, x, V, U, bias, routed, self.columns(name), n)
        return output


class _BlockedProduct(torch.autograd.Function):
    """One site's masked output. Rows are tokens; ``routed`` are the indices of the masked ones (None: all), of which the first n
    are attacked (None: all)."""

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
        low, ctx.x_like = y.dtype, (x.shape, x.dtype)
        y_tokens, x = y.reshape(-1, U.shape[1]), _cast(x.reshape(-1, V.shape[0]), low)
        y_rows, x_rows = (y_tokens, x) if routed is None else (y_tokens[routed], x[routed])
        acts, delta = torch.mm(x_rows, _cast(V, low)), columns.delta(ALL if routed is None else routed)
        low_delta = _cast(delta, low)
        output = y_rows * low_delta if bias is None else torch.lerp(_cast(bias, low), y_rows, low_delta)
        coefficients = torch.empty_like(acts)
        sizes = _sizes(acts)
        blocks = (_split(rows, sizes) for rows in (acts, coefficients, delta))
        for block, *tensors in zip(_tokens(routed, sizes), *blocks, strict=True):
            block_acts, block_coefficients, block_delta = tensors
            difference = columns.mask(columns.g(block), columns.r(block)).sub_(block_delta)
            torch.mul(difference, block_acts, out=block_coefficients)
        output.addmm_(coefficients, _cast(U, low))
        # V and U as they are stored, not their casts: where they are sharded, only these are freed after forward.
        ctx.save_for_backward(y_tokens if columns.grad_sources is not None else None, x, acts, V, U, bias, routed)
        ctx.columns, ctx.n = columns, n
        return (output if routed is None else y_tokens.index_copy(0, routed, output)).view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        y, x, acts, V, U, bias, routed = ctx.saved_tensors
        columns, (_, y_needs, x_needs, V_needs, U_needs, *_) = ctx.columns, ctx.needs_input_grad
        low, full, shape = grad.dtype, columns.values.dtype, grad.shape
        grad = grad.reshape(-1, U.shape[1])
        grad_rows = grad if routed is None else grad[routed]
        delta = columns.delta(ALL if routed is None else routed)
        grad_acts = torch.mm(
            grad_rows, _cast(U, low).t()
        )  # the gradient of coefficients; the loop makes it that of activations
        coefficients = torch.empty_like(acts) if U_needs else None
        grad_delta = None
        if columns.grad_sources is not None:
            y_rows = y if routed is None else y[routed]
            centred = y_rows if bias is None else y_rows - bias
            grad_delta = torch.linalg.vecdot(_cast(grad_rows, full), _cast(centred, full))
        sizes = _sizes(acts)
        blocks = (_split(rows, sizes) for rows in (acts, grad_acts, coefficients, delta, grad_delta))
        start = 0
        for block, *tensors in zip(_tokens(routed, sizes), *blocks, strict=True):
            block_acts, block_grad, block_coefficients, block_delta, block_grad_delta = tensors
            g, r = columns.g(block), columns.r(block)
            difference = columns.mask(g, r).sub_(block_delta)
            if block_coefficients is not None:
                torch.mul(block_acts, difference, out=block_coefficients)
            if columns.needs_gradients:
                grad_mask = _cast(block_grad, full) * _cast(block_acts, full)
                n = None if ctx.n is None else min(max(ctx.n - start, 0), len(block_acts))
                columns.add_mask_gradient(block, grad_mask, g, r, n)
                if block_grad_delta is not None:
                    block_grad_delta -= grad_mask.sum(-1)
            block_grad.mul_(difference)
            start += len(block_acts)
        if grad_delta is not None:
            columns.add_delta_gradient(ALL if routed is None else routed, grad_delta, ctx.n)
        grad_y = grad_x = None
        if y_needs:
            grad_y = grad_rows * _cast(delta, low)
            grad_y = (grad_y if routed is None else grad.index_copy(0, routed, grad_y)).view(shape)
        if x_needs:
            x_shape, x_dtype = ctx.x_like
            grad_x = torch.mm(grad_acts, _cast(V, low).t())
            grad_x = grad_x if routed is None else torch.zeros_like(x).index_copy_(0, routed, grad_x)
            grad_x = _cast(grad_x, x_dtype).view(x_shape)
        x_rows = x if routed is None or not V_needs else x[routed]
        grad_V = _cast(torch.mm(x_rows.t(), grad_acts), V.dtype) if V_needs else None
        grad_U = None if coefficients is None else _cast(torch.mm(coefficients.t(), grad_rows), U.dtype)
        return None, grad_y, grad_x, grad_V, grad_U, *[None] * 4


class _WholeMask(torch.autograd.Function):
    """A site's mask and Δ's, whose gradients go where those of ``_BlockedProduct`` go."""

    @staticmethod
    def forward(ctx: Any, handle: Tensor, columns: SiteColumns, n: int | None) -> tuple[Tensor, Tensor]:
        ctx.columns, ctx.n = columns, n
        return columns.mask(columns.g(ALL), columns.r(ALL)), columns.delta(ALL).squeeze(1).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mask: Tensor, grad_delta: Tensor) -> tuple[None, None, None]:  # type: ignore[override]
        columns = ctx.columns
        columns.add_mask_gradient(ALL, grad_mask, columns.g(ALL), columns.r(ALL), ctx.n)
        columns.add_delta_gradient(ALL, grad_delta, ctx.n)
        return None, None, None


# -- blocks: where there is one, or nothing to cast, no operation is called ----------------------------------------------


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _sizes(acts: Tensor) -> list[int]:
    """The number of rows of each block."""
    n = max(1, BLOCK // max(1, acts.shape[1]))
    return [min(n, len(acts) - start) for start in range(0, len(acts), n)]


def _split(rows: Tensor | None, sizes: list[int]) -> tuple[Tensor, ...] | list[None]:
    """Blocks of rows."""
    if rows is None:
        return [None] * len(sizes)
    return (rows,) if len(sizes) == 1 else rows.split(sizes)


def _tokens(routed: Tensor | None, sizes: list[int]) -> Sequence[Rows]:
    """The tokens that each block is of."""
    if routed is not None:
        return [routed] if len(sizes) == 1 else routed.split(sizes)
    ends = list(accumulate(sizes))
    return [ALL] if len(sizes) == 1 else [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def _with_deltas(sources: Tensor, site_axis: ConcatenatedAxis) -> dict[str, tuple[Tensor, Tensor]]:
    """Each site's columns of sources and of Δs' sources."""
    names = site_axis.names
    columns = sources.split([*site_axis.counts.values(), *[1] * len(names)], dim=-1)
    return dict(zip(names, zip(columns, columns[len(names) :], strict=False), strict=True))
