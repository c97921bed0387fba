"""How a layer turns queries and keys into scores, measured on the layer itself.

    score_h(t, t') = q_h(t)ᵀ K_{t−t'} k_h(t') + b_h(t, t')          K_τ = R_τ / scale

K is the rotation (any kind: partial, adjacent pairs, half-split, scaled; the identity without rotation) over the scale; b is what
does not depend on q and k: ALiBi, relative biases, masks. Queries and keys are replaced by unit vectors where the model puts them
out, and its scores read off; a last pass with random vectors checks that the measured K gives the scores, so that no model whose
scores are formed otherwise gets wrong numbers.

Left out: scores that are not bilinear in q and k (qk-norm, caps) or depend on positions other than through t − t'; both raise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from tl_vpd.adapters import Adapter, Unsupported
from tl_vpd.adapters.taps import tap_output
from tl_vpd.forward.masked_model import frozen, users_hooks_aside
from tl_vpd.hooks import attached_to

TOLERANCE = 1e-3
"""Allowed difference between scores and those of the measured kernel, over the largest score (half precision: 30 times)."""
_ROWS = 64


@dataclass(frozen=True)
class ScoreKernel:
    """``q(t)ᵀ K_{t−t'} k(t')`` of one layer, for the offsets ``t − t'`` that its mask lets through.

    ``values[i]`` belongs to ``offsets[i]``; ``offsets`` ascend in steps of one (0 … length−1 in causal attention).
    """

    layer: int
    offsets: Int[Tensor, " offset"]
    values: Float[Tensor, "offset d_head d_head"]

    @property
    def scale(self) -> float:
        """What products of queries and keys are divided by: ``1 / K_0[−1, −1]``, a direction turned slowest or not at all."""
        at_zero = self.values[int((self.offsets == 0).nonzero())]
        return float(1 / at_zero[-1, -1])

    def at(self, offset: int) -> Float[Tensor, "d_head d_head"]:
        """K of one offset; raises IndexError where the layer never looks that far."""
        place = offset - int(self.offsets[0])
        if not 0 <= place < len(self.offsets):
            raise IndexError(
                f"Offset {offset} was not measured: block {self.layer} was measured from {int(self.offsets[0])} to "
                f"{int(self.offsets[-1])} (longer prompts or a larger length reach further, a layer's window no more)."
            )
        return self.values[place]

    def scores(
        self, q: Float[Tensor, "batch query head d_head"], k: Float[Tensor, "batch key head d_head"]
    ) -> Float[Tensor, "batch head query key"]:
        """``q(t)ᵀ K_{t−t'} k(t')`` for every pair of positions of a measured offset; 0 elsewhere."""
        n_q, n_k = q.shape[1], k.shape[1]
        out = q.new_zeros(q.shape[0], q.shape[2], n_q, n_k)
        for offset, K in zip(self.offsets.tolist(), self.values.to(q), strict=True):
            t = torch.arange(max(0, offset), min(n_q, n_k + offset), device=q.device)
            if len(t):
                own = torch.einsum("bthd,de,bthe->bht", q[:, t], K, k[:, t - offset])
                out[:, :, t, t - offset] = own
        return out


def toeplitz(
    by_offset: Shaped[Tensor, "*rest offset"], offsets: Int[Tensor, " offset"], n_query: int, n_key: int
) -> Shaped[Tensor, "*rest query key"]:
    """What belongs to each pair of positions by their offset ``query − key``; 0 where the offset is not among ``offsets``."""
    device = by_offset.device
    apart = torch.arange(n_query, device=device)[:, None] - torch.arange(n_key, device=device)
    place = apart - int(offsets[0])
    known = (place >= 0) & (place < len(offsets))
    return torch.where(known, by_offset[..., place.clamp(0, len(offsets) - 1)], 0)


@torch.no_grad()
def measured_kernel(adapter: Adapter, layer: int, length: int) -> ScoreKernel:
    """The kernel of a layer for offsets up to ``length − 1``.

    Raises:
        Unsupported: scores are not bilinear (by name where the adapter knows why), or depend on more than the offset.
        KeyError: the block has no such attention. ValueError: the length is none that the model can run.
    """
    site = adapter.sites.get(f"blocks.{layer}.attn.W_Q")
    if site is None or site.d_head is None or f"blocks.{layer}.attn.W_K" not in adapter.sites:
        raise KeyError(f"Block {layer} has no W_Q and W_K that can be decomposed.")
    n_ctx = adapter.n_ctx
    if not 1 <= length <= n_ctx:
        raise ValueError(f"length={length}: offsets are measured for 1 to {n_ctx} tokens, the model's context.")
    d, heads = site.d_head, site.n_heads or 1
    n = min(n_ctx, length + d)
    zero = torch.zeros(1, n, heads, d, dtype=adapter.dtype, device=adapter.device)
    constant = scores_of(adapter, layer, zero, zero[:, :, :1])  # [1, head, n, n]
    seen = unmasked(constant)[0].all(0)
    apart = torch.arange(n, device=seen.device)[:, None] - torch.arange(n, device=seen.device)
    seen &= apart.abs() < length
    low = int(apart[seen].min())
    total = torch.zeros(int(apart[seen].max()) - low + 1, d, d, dtype=torch.float64, device=seen.device)
    count = torch.zeros_like(total)
    shifts = -(-d // max(1, n - length + 1))
    rows = [(first, shift) for first in range(0, d, heads) for shift in range(shifts)]
    unit = torch.eye(d, dtype=adapter.dtype, device=adapter.device)
    for start in range(0, len(rows), _ROWS):
        chunk = rows[start : start + _ROWS]
        i = torch.tensor([[(first + h) % d for h in range(heads)] for first, _ in chunk], device=seen.device)
        # Shifts are a whole number of windows apart, so that together they show every key direction at every offset.
        j = torch.tensor(
            [[(t + shift * (n - length + 1)) % d for t in range(n)] for _, shift in chunk], device=seen.device
        )
        q, k = unit[i][:, None].expand(-1, n, -1, -1), unit[j][:, :, None]
        found = (scores_of(adapter, layer, q, k) - constant).double()
        t, s = seen.nonzero(as_tuple=True)
        where = (
            (t - s - low).expand(len(chunk), heads, -1),
            i[:, :, None].expand(-1, -1, len(t)),
            j[:, None, s].expand(-1, heads, -1),
        )
        total.index_put_(where, found[:, :, t, s], accumulate=True)
        count.index_put_(where, torch.ones_like(found[:, :, t, s]), accumulate=True)
    assert bool((count > 0).all()), "some offset was not measured"
    kernel = ScoreKernel(layer, torch.arange(low, low + len(total), device=seen.device), (total / count).to(zero))
    _check(adapter, kernel, constant, seen)
    return kernel


def _check(
    adapter: Adapter, kernel: ScoreKernel, constant: Float[Tensor, "1 head n n"], seen: Bool[Tensor, "n n"]
) -> None:
    """Raises Unsupported unless the kernel gives the layer's scores for random queries and keys of another size."""
    heads, n, d = constant.shape[1], constant.shape[2], kernel.values.shape[-1]
    kv_heads = adapter.sites[f"blocks.{kernel.layer}.attn.W_K"].n_heads or 1
    generator = torch.Generator().manual_seed(0)
    q = 3 * torch.randn(1, n, heads, d, generator=generator).to(constant)
    k = 3 * torch.randn(1, n, kv_heads, d, generator=generator).to(constant)
    found = scores_of(adapter, kernel.layer, q, k) - constant
    expected = kernel.scores(q, k.repeat_interleave(heads // kv_heads, dim=2))
    off = float((found - expected)[..., seen].abs().max() / expected[..., seen].abs().max())
    if not off < (TOLERANCE if constant.dtype in (torch.float32, torch.float64) else 30 * TOLERANCE):
        raise Unsupported(
            f"The scores of block {kernel.layer} differ by {off:.2g} of the largest from any form q(t)ᵀ K k(t') with K a "
            "function of the offset: what its HookPoint shows are not scores before the softmax, or positions act in another "
            "way. Where a TransformerBridge leaves attention to transformers, a HookedTransformer may show them."
        )


def unmasked(scores: Float[Tensor, "*rest query key"]) -> Bool[Tensor, "*rest query key"]:
    """Where scores are not masked (−∞, or the lowest number of the dtype)."""
    return scores > torch.finfo(scores.dtype).min / 2


class _Seen(Exception):
    """The scores have been seen; the rest of the pass is not needed."""


def scores_of(
    adapter: Adapter,
    layer: int,
    q: Float[Tensor, "batch query head d_head"],
    k: Float[Tensor, "batch key some_heads d_head"],
    tokens: Int[Tensor, "batch query"] | None = None,
    token_mask: Bool[Tensor, "batch query"] | None = None,
) -> Float[Tensor, "batch head query key"]:
    """A layer's scores with these queries and keys in the place of its own (a key head axis of 1: all the same)."""
    if tokens is None:
        tokens = torch.zeros(q.shape[:2], dtype=torch.long, device=q.device)
        token_mask = torch.ones_like(tokens, dtype=torch.bool)
    found: list[Tensor] = []

    def put(value: Tensor, y: Tensor) -> Tensor:
        heads = y.shape[2] if y.ndim == 4 else y.shape[2] // q.shape[-1]
        every = (
            value.expand(-1, -1, heads, -1)
            if value.shape[2] == 1
            else value.repeat_interleave(heads // value.shape[2], 2)
        )
        return every.reshape(y.shape)

    def see(scores: Tensor) -> None:
        found.append(scores.clone())
        raise _Seen

    point = adapter.model.get_submodule(adapter.scores_hook(layer))
    with _quiet(adapter), ExitStack() as taps:
        for weight, value in (("W_Q", q), ("W_K", k)):
            for handle in adapter.tap(f"blocks.{layer}.attn.{weight}", _ignore, partial(put, value)):
                taps.callback(handle.remove)
        taps.callback(tap_output(point, see).remove)
        with suppress(_Seen):
            adapter.run(tokens, token_mask)
    if not found:
        raise Unsupported(f"Block {layer} ran without passing its scores through {adapter.scores_hook(layer)}.")
    return found[0]


def _ignore(x: Tensor) -> None:
    """Takes a site's input and leaves it."""


@contextmanager
def _quiet(adapter: Adapter) -> Iterator[None]:
    """The model itself: frozen, without users' hooks, and with what is attached paused."""
    attached = attached_to(adapter.model)
    paused = nullcontext() if attached is None else attached.paused()
    with frozen(adapter), users_hooks_aside(adapter), adapter.lengths_forgotten(), paused:
        yield
