"""Attention heads of other blocks that a subcomponent passes through, by the weights alone.

    read by head h of a later block       ‖u W_V^h W_O^h‖ √d_model / ‖W_V^h W_O^h‖_F,     u = U[c] / ‖U[c]‖    (sites O and out)
    written by head h of an earlier one   ‖W_V^h W_O^h v‖ √d_model / ‖W_V^h W_O^h‖_F,     v = V[:, c] / ‖V[:, c]‖   (the others)

(VPD paper, alignment of subcomponents with heads.) 1 is what a random direction has. Norms between the blocks are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_vpd.adapters import Adapter
from tl_vpd.analysis.attention.ov import ov_factors
from tl_vpd.decomposition import Decomposition

WRITE = ("o", "out")
"""Sites that write into the residual stream."""


@torch.no_grad()
def heads_of(decomposition: Decomposition, adapter: Adapter, k: int) -> dict[str, list[list[list[Any]]]]:
    """For each site and subcomponent the ``k`` strongest ``[block, head, alignment]``; sites without any are left out."""
    factors = dict(_factors(adapter)) if k else {}
    result = {}
    for name, site in decomposition.sites.items():
        if site.layer is None:
            continue
        writes, d = site.short in WRITE, site.d_out if site.short in WRITE else site.d_in
        blocks = [b for b in factors if (b > site.layer if writes else b < site.layer) and _fits(factors[b], d)]
        if not blocks:
            continue
        direction = decomposition.U[name] if writes else decomposition.V[name].T
        direction = direction.detach().to(factors[blocks[0]][0])
        unit = direction / direction.norm(dim=1, keepdim=True).clamp_min(1e-30)
        values = torch.cat([_alignment(unit, *factors[b], writes=writes) for b in blocks], dim=1)
        heads = [[b, h] for b in blocks for h in range(len(factors[b][0]))]
        best = values.topk(min(k, len(heads)), dim=1)
        rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        result[name] = [[[*heads[i], round(x, 2)] for i, x in zip(*row, strict=True)] for row in rows]
    return result


def _factors(adapter: Adapter) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    for layer in sorted({site.layer for site in adapter.sites.values() if site.layer is not None}):
        try:
            yield layer, ov_factors(adapter, layer)
        except KeyError:  # a block without attention
            continue


def _fits(factors: tuple[Tensor, Tensor], d: int) -> bool:
    return factors[0].shape[1] == d == factors[1].shape[2]


def _alignment(
    unit: Float[Tensor, "C d_model"],
    W_V: Float[Tensor, "head d_model d_head"],
    W_O: Float[Tensor, "head d_head d_model"],
    *,
    writes: bool,
) -> Float[Tensor, "C head"]:
    columns = []
    for value, output in zip(W_V, W_O, strict=True):  # W_OV itself is never formed
        size = ((value.T @ value) * (output @ output.T)).sum().clamp_min(1e-30).sqrt()
        moved = unit @ value @ output if writes else unit @ output.T @ value.T
        columns.append(moved.norm(dim=1) * math.sqrt(unit.shape[1]) / size)
    return torch.stack(columns, dim=1)
