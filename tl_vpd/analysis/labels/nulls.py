"""Firings without a trained Γ or a decomposition behind them: what labels and their scores are compared with.

=================  =================================================================================================
untrained          where an untrained Γ of the same shape, which reads the same, gives the highest pre-sigmoid values
random directions  where random directions of each site's input, less its mean, have the largest projections
shuffled           at random tokens (``Firings.shuffled``)
=================  =================================================================================================

Each subcomponent fires exactly as often as in the firings that it is the null of.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_vpd.analysis.harvest.run import chosen_columns
from tl_vpd.analysis.labels.firings import Firings, by_site, joined
from tl_vpd.checks import choice, instance, integer, seed_of
from tl_vpd.decomposition import Decomposition
from tl_vpd.evaluation.nulls import untrained
from tl_vpd.forward import MaskedModel

Null = Literal["untrained", "random directions", "shuffled"]
NULLS: tuple[Null, ...] = ("untrained", "random directions", "shuffled")
Values = Callable[[Mapping[str, Tensor], Tensor | None, Int[Tensor, " C"]], Tensor]
"""What ranks the tokens of some columns: from a batch's inputs and padding, ``[row, pos, C]``."""


@torch.no_grad()
def null_firings(
    decomposition: Decomposition,
    model: nn.Module,
    firings: Firings,
    *,
    null: Null,
    seed: int = 0,
    batch_size: int = 32,
    max_bytes: int = 1 << 28,
) -> Firings:
    """The firings of a null, on the same rows and with the same number of firings of every subcomponent.

    Args:
        decomposition: that the firings are of.
        model: the target.
        firings: of subcomponents.
        null: ``untrained``, ``random directions`` or ``shuffled``.
        seed: of the untrained Γ, the directions or the tokens.
        batch_size: rows run at once.
        max_bytes: of the values that are ranked; with more, the model runs over all rows more than once.

    Raises:
        TypeError: an argument is of another type.
        ValueError: there is no such null, a number is out of range, or the model has other weights.
        KeyError: the firings are of components or of another decomposition.
    """
    instance("decomposition", decomposition, Decomposition)
    instance("firings", firings, Firings)
    kind, seed = choice("null", null, NULLS), seed_of(seed)
    batch_size, max_bytes = integer("batch_size", batch_size, minimum=1), integer("max_bytes", max_bytes, minimum=1)
    columns = chosen_columns(decomposition, list(firings.addresses))
    values = _of_untrained(decomposition, seed) if kind == "untrained" else _of_directions(decomposition, seed)
    block = max(1, max_bytes // (4 * firings.tokens.size))
    chosen: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    with MaskedModel(decomposition, model) as masked_model:
        if kind == "shuffled":
            return firings.shuffled(seed)
        for part in columns.split(block):
            ranked = _values(masked_model, firings, part, values, batch_size)
            chosen += [_largest(column, firings, len(chosen) + i) for i, column in enumerate(ranked.T)]
    return joined(firings, chosen)


def _values(
    masked_model: MaskedModel, firings: Firings, columns: Int[Tensor, " C"], values: Values, batch_size: int
) -> Float[Tensor, "token C"]:
    """The values of some columns at all tokens, on the CPU, less their mean over real tokens; −∞ at padding."""
    tokens = torch.from_numpy(firings.tokens).to(masked_model.adapter.device)
    real = torch.from_numpy(firings.real)
    mask = None if bool(real.all()) else real.to(tokens.device)
    result = torch.empty(*tokens.shape, len(columns))
    for start in range(0, len(tokens), batch_size):
        rows = slice(start, start + batch_size)
        batch_mask = None if mask is None else mask[rows]
        _, inputs = masked_model.clean(tokens[rows], batch_mask)
        result[rows] = values(inputs, batch_mask, columns.to(tokens.device)).cpu().float()
    result -= result[real].mean(0)
    return result.masked_fill(~real[..., None], -torch.inf).flatten(0, 1)


def _largest(values: Float[Tensor, " token"], firings: Firings, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The tokens of the largest values, as many as the i-th address fires at, with its importances in the same order."""
    g = np.sort(firings.importances[firings.of(i)])[::-1]
    top = values.topk(len(g))
    order = top.indices.argsort().numpy()
    return top.indices.numpy()[order], g[order], top.values.numpy()[order]


def _of_untrained(decomposition: Decomposition, seed: int) -> Values:
    null = untrained(decomposition, seed=seed)
    return lambda inputs, mask, columns: null.pre_sigmoid(inputs, mask)[..., columns]


def _of_directions(decomposition: Decomposition, seed: int) -> Values:
    def values(inputs: Mapping[str, Tensor], mask: Tensor | None, columns: Int[Tensor, " C"]) -> Tensor:
        products = []
        for name, indices in by_site(decomposition, columns).items():
            generator = torch.Generator().manual_seed(zlib.crc32(f"random directions/{seed}/{name}".encode()))
            directions = torch.randn(decomposition.sites[name].d_in, decomposition.counts[name], generator=generator)
            products.append(inputs[name] @ directions[:, indices.cpu()].to(inputs[name]))
        return torch.cat(products, dim=-1)

    return values
