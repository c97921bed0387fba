"""Small transformers from a seed."""

from __future__ import annotations

import random

import numpy as np
import torch

from tests.marks import needs_hooked_transformer
from tl_vpd.toys.transformers import small_transformer

SETTINGS = {"n_layers": 1, "d_model": 8, "n_heads": 2, "d_head": 4, "d_vocab": 6, "n_ctx": 5, "attn_only": True}


@needs_hooked_transformer
def test_a_seed_gives_the_weights_and_reseeds_no_generator_of_the_user(monkeypatch):
    reseeded = []
    for name in ("manual_seed", "manual_seed_all"):
        monkeypatch.setattr(torch.cuda, name, lambda seed, name=name: reseeded.append(name))
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first, second, other = (small_transformer(seed, **SETTINGS) for seed in (3, 3, 4))
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert reseeded == []
    assert torch.equal(first.W_Q, second.W_Q) and not torch.equal(first.W_Q, other.W_Q)
