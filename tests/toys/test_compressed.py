"""Compressed computation: the residual MLP against NumPy, what it learns, what is true of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import tl_vpd
from tl_vpd.toys import TOYS, Compressed, TargetTraining, train

SMALL = Compressed(
    n_features=12,
    d_resid=60,
    neurons=6,
    n_layers=2,
    probability=0.05,
    vectors=16,
    training=TargetTraining(200, 16, 1e-2, "cosine"),
)


def test_the_model_is_a_residual_mlp_between_an_embedding_and_its_transpose():
    model = SMALL.build(4)
    x = SMALL.batches(3, seed=1).at(0)
    W_E = model.W_E.double().numpy()
    h = x.double().numpy() @ W_E
    for layer in model.layers:
        W_in, W_out = (w.weight.detach().double().numpy().T for w in (layer.W_in, layer.W_out))
        h = h + np.maximum(h @ W_in, 0) @ W_out
    assert_close(model(x).detach(), torch.from_numpy(h @ W_E.T).float(), atol=1e-5, rtol=1e-4)
    assert_close(model.W_E.norm(dim=-1), torch.ones(12))
    assert tl_vpd.sites(model)["site"].tolist() == [f"layers.{i}.{w}" for i in range(2) for w in ("W_in", "W_out")]
    _, cache = model.run_with_cache(x)
    assert cache["layers.1.hook_post"].shape == (3, 16, 6) and "hook_resid_final" in cache


def test_training_computes_part_of_the_features_and_leaves_the_embedding_alone():
    model = train(SMALL, 0)
    quality = SMALL.quality(model)
    assert quality["error"] < 0.7 * quality["error_without_layers"]
    assert torch.equal(model.W_E, SMALL.build(0).W_E)
    x = SMALL.batches(2, seed=9).at(0)
    with torch.no_grad():
        assert_close(SMALL.loss(model, x), (model(x) - (x + x.relu())).square().mean())


@pytest.mark.parametrize(
    ("name", "counts"), [("compressed", [100, 50]), ("compressed_2", [100, 25] * 2), ("compressed_3", [102, 17] * 3)]
)
def test_the_truth_has_a_subcomponent_a_feature_and_every_w_out_whole(name, counts):
    toy = TOYS[name]
    model = toy.build(0)
    truth = toy.truth(model)
    assert [own.count for own in truth.sites.values()] == counts
    assert list(truth.sites) == tl_vpd.sites(model)["site"].tolist()
    for site, own in truth.sites.items():
        assert (own.axis, own.basis is None) == (("in", False) if site.endswith("W_in") else (None, True))
    data = toy.batches(1).at(0)
    assert data.shape == (1, 64, toy.n_features) and data.min() < 0
