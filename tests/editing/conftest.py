"""A tiny model with a decomposition, and edits of every kind."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import draw
from tl_vpd.editing import Edit, add, remove, scale, write_direction

OUT, WO, Q = "blocks.1.mlp.W_out", "blocks.0.attn.W_O", "blocks.1.attn.W_Q"


@pytest.fixture
def edit(vpd) -> Edit:
    """One that removes, scales, rewrites and adds, at four sites."""
    vector = draw(8, seed=3) - 0.5
    added = add(vpd, "blocks.0.mlp.W_in", draw(8, seed=4) - 0.5, draw(12, seed=5) - 0.5)
    return (
        remove(vpd, f"{OUT}:2")
        + scale(vpd, [f"{Q}:1", f"{Q}:4"], -0.5)
        + write_direction(vpd, f"{WO}:0", vector)
        + added
    )


def deltas(vpd, edit: Edit) -> dict[str, torch.Tensor]:
    """ΔW by site, one outer product after the other."""
    result: dict[str, torch.Tensor] = {}
    for piece in edit.pieces:
        result.setdefault(piece.site, torch.zeros(len(piece.read), len(piece.change), dtype=torch.float64))
        result[piece.site] += torch.outer(piece.read, piece.change)
    return result
