"""A tiny model with a decomposition, and edits of every kind."""

from __future__ import annotations

import pytest
import torch

from tests.matrix import models
from tests.tiny import decomposition_of, draw, tiny_model
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


@pytest.fixture
def padded(tmp_path):
    """A model whose tokenizer pads on the left, its decomposition, and four rows of 9, 4, 7 and 3 tokens."""
    model = tiny_model(d_vocab=models.D_VOCAB, tokenizer=models.tokenizer(tmp_path))
    model.tokenizer.padding_side = "left"
    tokens = models.tokens((4, 9))
    for row, length in enumerate((9, 4, 7, 3)):
        tokens[row, : 9 - length] = model.tokenizer.pad_token_id
    return model, decomposition_of(model).double(), tokens


def deltas(vpd, edit: Edit) -> dict[str, torch.Tensor]:
    """ΔW by site, one outer product after the other."""
    result: dict[str, torch.Tensor] = {}
    for piece in edit.pieces:
        result.setdefault(piece.site, torch.zeros(len(piece.read), len(piece.change), dtype=torch.float64))
        result[piece.site] += torch.outer(piece.read, piece.change)
    return result
