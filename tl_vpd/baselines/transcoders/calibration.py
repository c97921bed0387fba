"""Thresholds for batch top-k transcoders that came without them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tl_vpd.baselines.transcoders.replaced_model import ReplacedModel, read_by
from tl_vpd.baselines.transcoders.transcoders import Transcoder, Transcoders
from tl_vpd.checks import instance, integer, number


@torch.no_grad()
def calibrate(
    transcoders: Transcoders, model: nn.Module, tokens: Any, k: float, *, batch_size: int = 16
) -> Transcoders:
    """The same transcoders with one threshold per layer, at which k latents per token are active on these tokens.

    The threshold is the mean over batches of the value that the ``k`` · (tokens) largest activations of a batch exceed, as batch
    top-k transcoders without their batch have it.

    Args:
        transcoders: of the model.
        model: the target.
        tokens: rows, or prompts.
        k: active latents per token and layer.
        batch_size: how many rows run together.

    Raises:
        TypeError: an argument is of another type.
        ValueError: the transcoders do not fit the model, or k is not above 0 and below the number of latents.
    """
    instance("transcoders", transcoders, Transcoders)
    k, batch_size = number("k", k, above=0), integer("batch_size", batch_size, minimum=1)
    if k >= min(transcoders.n_latents.values()):
        raise ValueError(f"k={k:g}: give fewer than the {min(transcoders.n_latents.values())} latents of a layer.")
    found: dict[int, list[Tensor]] = {layer: [] for layer in transcoders.layers}
    with ReplacedModel(model) as replaced:
        replaced.check(transcoders)
        rows = replaced.adapter.tokens(tokens)
        mask = replaced.adapter.padding(rows, None)
        for at in range(0, len(rows), batch_size):
            part = None if mask is None else mask[at : at + batch_size]
            clean = replaced.clean(rows[at : at + batch_size], part)
            for layer, x in read_by(transcoders, clean).items():
                z = transcoders[layer].pre_acts(x.flatten(0, -2) if part is None else x[part]).relu()
                count = max(1, round(k * len(z)))
                found[layer].append(z.flatten().topk(count + 1).values[-1])
    layers = {}
    for layer in transcoders.layers:
        tensors = dict(transcoders[layer].named_parameters())
        threshold = torch.full_like(tensors["threshold"], float(torch.stack(found[layer]).mean()))
        layers[layer] = Transcoder(**{**tensors, "threshold": threshold})
    return Transcoders(layers, cross_layer=transcoders.cross_layer, reads=transcoders.reads, record=transcoders.record)
