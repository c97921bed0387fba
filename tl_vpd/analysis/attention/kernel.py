"""How a layer turns queries and keys into scores, measured on the layer itself.

    score_h(t, t') = q_h(t)ᵀ K_{t−t'} k_h(t') + b_h(t, t')          K_τ = R_τ / scale

K is the rotation (any kind: partial, adjacent pairs, half-split, scaled; the identity without rotation) over the scale; b is what
does not depend on q and k: ALiBi, relative biases, masks. Queries and keys are replaced by unit vectors where the model returns
them, and its scores are read; a last pass with random vectors checks that the measured K gives the scores, so that no model whose
scores are formed in another way gets wrong numbers.

Left out: scores that are not bilinear in q and k (qk-norm, caps) or depend on positions other than through t − t'; both raise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from tl_vpd.adapters import Adapter, Unsupported
from tl_vpd.analysis.attention.layer_scores import allowed_error, scores_of, unmasked
from tl_vpd.checks import integer
from tl_vpd.printing import Printed

BYTES = 1 << 28
"""What the scores of one batch of measurements may fill; a single row (one prompt of the model) may take more."""


@dataclass(frozen=True)
class ScoreKernel(Printed):
    """``q(t)ᵀ K_{t−t'} k(t')`` of one layer, for the offsets ``t − t'`` that its mask lets through.

    Attributes:
        layer: the block's index.
        offsets: ascending in steps of one (0 … length−1 in causal attention).
        values: K of each offset.
    """

    layer: int
    offsets: Int[Tensor, " offset"]
    values: Float[Tensor, "offset d_head d_head"]

    @property
    def scale(self) -> float:
        """What products of queries and keys are divided by: ``1 / K_0[−1, −1]``, a direction that turns slowest or not at all."""
        at_zero = self.values[int((self.offsets == 0).nonzero())]
        return float(1 / at_zero[-1, -1])

    def scores(
        self, q: Float[Tensor, "batch query head d_head"], k: Float[Tensor, "batch key head d_head"]
    ) -> Float[Tensor, "batch head query key"]:
        """``q(t)ᵀ K_{t−t'} k(t')`` for every pair of positions of a measured offset; 0 elsewhere."""
        n_q, n_k = q.shape[1], k.shape[1]
        scores = q.new_zeros(q.shape[0], q.shape[2], n_q, n_k)
        for offset, K in zip(self.offsets.tolist(), self.values.to(q), strict=True):
            t = torch.arange(max(0, offset), min(n_q, n_k + offset), device=q.device)
            if len(t):
                scores[:, :, t, t - offset] = torch.einsum("bthd,de,bthe->bht", q[:, t], K, k[:, t - offset])
        return scores


def toeplitz(
    by_offset: Shaped[Tensor, "*rest offset"], offsets: Int[Tensor, " offset"], n_query: int, n_key: int
) -> Shaped[Tensor, "*rest query key"]:
    """What belongs to each pair of positions by their offset ``query − key``; 0 where the offset is not among ``offsets``."""
    index = _offsets(n_query, n_key, by_offset.device) - int(offsets[0])
    known = (index >= 0) & (index < len(offsets))
    return torch.where(known, by_offset[..., index.clamp(0, len(offsets) - 1)], 0)


def _offsets(n_query: int, n_key: int, device: torch.device) -> Int[Tensor, "query key"]:
    return torch.arange(n_query, device=device)[:, None] - torch.arange(n_key, device=device)


@torch.no_grad()
def measured_kernel(adapter: Adapter, layer: int, length: int) -> ScoreKernel:
    """The kernel of a layer for offsets up to ``length − 1``. Raises KeyError where the block has no such attention, Unsupported
    where scores are not bilinear (by name where the adapter knows why) or depend on more than the offset.
    """
    site = adapter.sites.get(f"blocks.{layer}.attn.W_Q")
    if site is None or site.d_head is None or f"blocks.{layer}.attn.W_K" not in adapter.sites:
        raise KeyError(f"Block {layer} has no W_Q and W_K that can be decomposed.")
    n_ctx = adapter.n_ctx
    length = integer("length", length, minimum=1, maximum=n_ctx)
    d, heads = site.d_head, site.n_heads or 1
    n = min(n_ctx, length + d)
    zero = torch.zeros(1, n, heads, d, dtype=adapter.dtype, device=adapter.device)
    constant = scores_of(adapter, layer, zero, zero[:, :, :1])  # [1, head, n, n]
    offset = _offsets(n, n, constant.device)
    visible = unmasked(constant)[0].all(0) & (offset.abs() < length)
    low, high = int(offset[visible].min()), int(offset[visible].max())
    sums = _UnitSums(high - low + 1, d, offset[visible] - low, constant.device)
    window = n - length + 1
    for rows in _batches(d, heads, n, window):
        i = torch.tensor([[(first + h) % d for h in range(heads)] for first, _ in rows], device=constant.device)
        # Shifts are a whole number of windows long, so that together they show every key direction at every offset.
        j = torch.tensor([[(t + shift * window) % d for t in range(n)] for _, shift in rows], device=constant.device)
        unit = torch.eye(d, dtype=adapter.dtype, device=adapter.device)
        q, k = unit[i][:, None].expand(-1, n, -1, -1), unit[j][:, :, None]
        sums.add(scores_of(adapter, layer, q, k) - constant, i, j, visible)
    offsets = torch.arange(low, high + 1, device=constant.device)
    kernel = ScoreKernel(layer, offsets, sums.mean().to(zero))
    _check(adapter, kernel, constant, visible)
    return kernel


def _batches(d: int, heads: int, n: int, window: int) -> Iterator[list[tuple[int, int]]]:
    """Rows ``(first query direction, shift of key directions)`` that show every pair of directions, as many as fit at once."""
    shifts = -(-d // max(1, window))
    rows = [(first, shift) for first in range(0, d, heads) for shift in range(shifts)]
    at_once = max(1, BYTES // (4 * 8 * heads * n * n))  # scores, their difference and what the model makes of them
    for start in range(0, len(rows), at_once):
        yield rows[start : start + at_once]


class _UnitSums:
    """Sums and counts of scores of unit vectors by offset (of visible pairs, from 0), query direction i and key direction j."""

    def __init__(self, offsets: int, d: int, offset: Int[Tensor, " pair"], device: torch.device) -> None:
        self.d, self.offset = d, offset
        self.total = torch.zeros(offsets, d, d, dtype=torch.float64, device=device)
        self.count = torch.zeros(offsets, d, d, device=device)

    def add(
        self,
        scores: Float[Tensor, "row head n n"],
        i: Int[Tensor, "row head"],
        j: Int[Tensor, "row n"],
        visible: Bool[Tensor, "n n"],
    ) -> None:
        """Adds the visible scores, a row and head at a time, which keeps the indices small."""
        keys = visible.nonzero()[:, 1]
        for row in range(len(scores)):
            for head in range(scores.shape[1]):
                index = (self.offset * self.d + i[row, head]) * self.d + j[row, keys]
                self.total.view(-1).index_add_(0, index, scores[row, head][visible].double())
                self.count.view(-1).index_add_(0, index, torch.ones_like(index, dtype=self.count.dtype))

    def mean(self) -> Float[Tensor, "offset d d"]:
        """K of every offset."""
        assert bool((self.count > 0).all()), "some offset was not measured"
        return self.total / self.count


def _check(
    adapter: Adapter, kernel: ScoreKernel, constant: Float[Tensor, "1 head n n"], visible: Bool[Tensor, "n n"]
) -> None:
    """Raises Unsupported unless the kernel gives the layer's scores for random queries and keys of another size."""
    heads, n, d = constant.shape[1], constant.shape[2], kernel.values.shape[-1]
    kv_heads = adapter.sites[f"blocks.{kernel.layer}.attn.W_K"].n_heads or 1
    generator = torch.Generator().manual_seed(0)
    q = 3 * torch.randn(1, n, heads, d, generator=generator).to(constant)
    k = 3 * torch.randn(1, n, kv_heads, d, generator=generator).to(constant)
    measured = scores_of(adapter, kernel.layer, q, k) - constant
    expected = kernel.scores(q, k.repeat_interleave(heads // kv_heads, dim=2))
    error = float((measured - expected)[..., visible].abs().max() / expected[..., visible].abs().max())
    if not error < allowed_error(constant.dtype):
        raise Unsupported(
            f"The scores of block {kernel.layer} differ by {error:.2g} of the largest from any form q(t)ᵀ K k(t') with K a "
            "function of the offset: what its HookPoint shows are not scores before the softmax, or positions act in another "
            "way. Where a TransformerBridge leaves attention to transformers, a HookedTransformer may show them."
        )
