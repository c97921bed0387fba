"""Do two trainings of transcoders, from other seeds or with other sizes, give the same latents?

As for decompositions (``tl_vpd.evaluation.consistency``): for every latent the largest cosine to any of the other's, averaged
over latents and both directions, of encoders (V), of decoders (U; a cross-layer latent's decoders as one vector), and of both
multiplied, each beside as many random directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from tl_vpd.baselines.transcoders.transcoders import Transcoders
from tl_vpd.checks import instance, seed_of, shown
from tl_vpd.evaluation.consistency import mean_of_rows, row_of


@torch.no_grad()
def transcoder_consistency(
    one: Transcoders,
    other: Transcoders,
    *,
    alive: tuple[Mapping[int, Bool[Tensor, " _"]], Mapping[int, Bool[Tensor, " _"]]] | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """A row for each layer, and their mean: mean max cosine of encoders, decoders and both, each next to its random baseline.

    Args:
        one: transcoders of a model.
        other: of the same model and layers, cross-layer or per-layer as the first.
        alive: which latents of each to compare, by layer (None: all).
        seed: of the random baselines.

    Raises:
        TypeError: an argument is of another type.
        ValueError: the two are of other layers, sizes or kinds.
    """
    seed = seed_of(seed)
    for name, transcoders in (("one", one), ("other", other)):
        instance(name, transcoders, Transcoders)
    if alive is not None:
        _check_alive(alive, (one, other))
    shapes = [
        {layer: (*t[layer].W_dec.shape[::2], t[layer].sizes[0]) for layer in t.layers} | {"reads": t.reads}
        for t in (one, other)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "These transcoders replace other MLPs, or one is cross-layer and one not: compare like with like."
        )
    rows = []
    for layer in one.layers:
        vectors = [_vectors(t, layer, None if alive is None else alive[i][layer]) for i, t in enumerate((one, other))]
        rows.append({"site": f"blocks.{layer}.mlp", **row_of(*vectors[0], *vectors[1], seed=seed)})
    return mean_of_rows(rows)


def _check_alive(alive: Any, pair: tuple[Transcoders, Transcoders]) -> None:
    """Raises TypeError or ValueError unless ``alive`` has True or False for each latent of both."""
    if not isinstance(alive, tuple | list) or len(alive) != 2 or not all(isinstance(a, Mapping) for a in alive):
        raise TypeError(f"alive={shown(alive)}: give a pair of tensors of bools by layer.")
    for bounds, transcoders in zip(alive, pair, strict=True):
        for layer, n in transcoders.n_latents.items():
            tensor = bounds.get(layer)
            if not isinstance(tensor, Tensor) or tensor.dtype != torch.bool or tuple(tensor.shape) != (n,):
                raise ValueError(
                    f"alive has {shown(tensor)} for layer {layer}: give True or False for each of its {n} latents."
                )


def _vectors(transcoders: Transcoders, layer: int, alive: Tensor | None) -> tuple[Tensor, Tensor]:
    """Encoders ``[d_in, n]`` and decoders ``[n, targets · d_out]`` in float64."""
    one = transcoders[layer]
    V, U = (t.detach().double().cpu() for t in (one.W_enc, one.W_dec.transpose(0, 1).flatten(1)))
    return (V, U) if alive is None else (V[:, alive.cpu()], U[alive.cpu()])
