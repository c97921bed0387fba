"""A layer's scores for chosen queries and keys, as the layer itself computes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_vpd.adapters import Adapter, Unsupported
from tl_vpd.adapters.taps import tap_output
from tl_vpd.forward.quiet import frozen, users_hooks_aside
from tl_vpd.hooks import attached_to


def allowed_error(dtype: torch.dtype) -> float:
    """How far scores that are put together may be from the layer's, over the largest score."""
    return 1e-3 if dtype in (torch.float32, torch.float64) else 3e-2


def unmasked(scores: Float[Tensor, "*rest query key"]) -> Bool[Tensor, "*rest query key"]:
    """Where scores are not masked (−∞, or the lowest number of the dtype)."""
    return scores > torch.finfo(scores.dtype).min / 2


class _ScoresRead(Exception):
    """The scores have been read; the rest of the pass is not needed."""


def scores_of(
    adapter: Adapter,
    layer: int,
    q: Float[Tensor, "batch query head d_head"],
    k: Float[Tensor, "batch key key_head d_head"],
    tokens: Int[Tensor, "batch query"] | None = None,
    token_mask: Bool[Tensor, "batch query"] | None = None,
) -> Float[Tensor, "batch head query key"]:
    """A layer's scores with these queries and keys in place of the computed ones.

    Args:
        adapter: of the model.
        layer: the block's index.
        q: queries.
        k: keys; with a head axis of 1, all heads have the same.
        tokens: that are run (None: any of the length of q; only masks and positional biases depend on them).
        token_mask: False at padding of ``tokens`` (None: no padding).
    """
    if tokens is None:
        tokens = torch.zeros(q.shape[:2], dtype=torch.long, device=q.device)
        token_mask = torch.ones_like(tokens, dtype=torch.bool)
    scores: list[Tensor] = []

    def put(value: Tensor, y: Tensor) -> Tensor:
        heads = y.shape[2] if y.ndim == 4 else y.shape[2] // q.shape[-1]
        if value.shape[2] == 1:
            return value.expand(-1, -1, heads, -1).reshape(y.shape)
        return value.repeat_interleave(heads // value.shape[2], 2).reshape(y.shape)

    def read(value: Tensor) -> None:
        scores.append(value.clone())
        raise _ScoresRead

    point = adapter.model.get_submodule(adapter.scores_hook(layer))
    with _quiet(adapter), ExitStack() as taps:
        for weight, value in (("W_Q", q), ("W_K", k)):
            for handle in adapter.tap(f"blocks.{layer}.attn.{weight}", lambda x: None, partial(put, value)):
                taps.callback(handle.remove)
        taps.callback(tap_output(point, read).remove)
        with suppress(_ScoresRead):
            adapter.run(tokens, token_mask)
    if not scores:
        raise Unsupported(f"Block {layer} ran without passing its scores through {adapter.scores_hook(layer)}.")
    return scores[0]


@contextmanager
def _quiet(adapter: Adapter) -> Iterator[None]:
    """The model itself: frozen, without users' hooks, and with what is attached paused."""
    attached = attached_to(adapter.model)
    paused = nullcontext() if attached is None else attached.paused()
    with frozen(adapter), users_hooks_aside(adapter), adapter.lengths_forgotten(), paused:
        yield
