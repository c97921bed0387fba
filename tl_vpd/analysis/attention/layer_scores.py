"""A layer's scores for chosen queries and keys, as the layer itself computes them."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_vpd.adapters import Adapter, Unsupported
from tl_vpd.adapters.taps import tap_output, tapped
from tl_vpd.forward import SitePass, SiteTaps
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

    Keys with a head axis of 1 are the same for all heads. Without tokens any of the length of q are run: only masks and
    positional biases depend on them.
    """
    if tokens is None:
        tokens = torch.zeros(q.shape[:2], dtype=torch.long, device=q.device)
        token_mask = torch.ones_like(tokens, dtype=torch.bool)
    scores: list[Tensor] = []
    values = {f"blocks.{layer}.attn.W_Q": q, f"blocks.{layer}.attn.W_K": k}

    def put(name: str, x: Tensor, y: Tensor) -> Tensor:
        value = values[name]
        heads = y.shape[2] if y.ndim == 4 else y.shape[2] // q.shape[-1]
        if value.shape[2] == 1:
            return value.expand(-1, -1, heads, -1).reshape(y.shape)
        return value.repeat_interleave(heads // value.shape[2], 2).reshape(y.shape)

    def read(value: Tensor) -> None:
        scores.append(value.clone())
        raise _ScoresRead

    taps, attached = SiteTaps(adapter, list(values)), attached_to(adapter.model)
    paused = nullcontext() if attached is None else attached.paused()
    with paused, adapter.lengths_forgotten(), taps.on(), taps.during(SitePass(put)):
        point = adapter.model.get_submodule(adapter.scores_hook(layer))
        with tapped(partial(tap_output, point, read)), suppress(_ScoresRead):
            adapter.run(tokens, token_mask)
    if not scores:
        raise Unsupported(f"Block {layer} ran without passing its scores through {adapter.scores_hook(layer)}.")
    return scores[0]
