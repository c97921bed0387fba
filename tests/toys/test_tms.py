"""The toy model of superposition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import tl_vpd
from tl_vpd.toys import TMS, TOYS, train


@pytest.mark.parametrize("identity", [False, True])
def test_the_model_is_relu_of_the_transpose_of_w_after_w(identity):
    toy = TMS(5, 2, identity=identity)
    model = train(toy, seed=3, steps=20)
    x = toy.batches(2, seed=1).at(0)
    W = model.embed.weight.detach().double().numpy()
    b = model.unembed.bias.detach().double().numpy()
    expected = np.maximum(x.double().numpy() @ W.T @ W + b, 0)
    assert_close(model(x).detach(), torch.from_numpy(expected).float(), atol=1e-6, rtol=1e-5)
    assert torch.equal(model.unembed.weight, model.embed.weight.T)
    assert_close(model.tied(x), model(x))
    names = ["embed", "identity", "unembed"] if identity else ["embed", "unembed"]
    assert tl_vpd.sites(model)["site"].tolist() == names
    _, cache = model.run_with_cache(x)
    assert_close(cache["hook_hidden"], x @ model.embed.weight.T)
    if identity:
        assert torch.equal(model.identity.weight, torch.eye(2))


def test_training_is_the_same_from_the_same_seed_and_represents_every_feature():
    toy = TMS(5, 2)
    model, again, other = train(toy, 0, steps=1200), train(toy, 0, steps=1200), train(toy, 1, steps=1)
    assert torch.equal(model.embed.weight, again.embed.weight)
    assert not torch.equal(toy.build(0).embed.weight, toy.build(1).embed.weight)
    assert not torch.equal(model.embed.weight, other.embed.weight)
    quality = toy.quality(model)
    assert quality["error"] < 0.4 * quality["error_of_zero"] and quality["shortest_feature"] > 0.8


def test_the_gradient_of_w_comes_from_both_layers():
    toy = TMS(3, 2)
    model = toy.build(0)
    x = toy.batches(1).at(0)
    toy.loss(model, x).backward()
    W = model.embed.weight.detach().double().requires_grad_()
    out = (x.double() @ W.T @ W + model.unembed.bias.detach().double()).relu()
    (out - x.double()).square().mean().backward()
    assert_close(model.embed.weight.grad.double(), W.grad, atol=1e-7, rtol=1e-4)
    assert model.unembed.weight.grad is None


def test_the_truth_has_a_subcomponent_a_feature_and_the_whole_identity():
    toy = TOYS["tms_40_10_id"]
    truth = toy.truth(toy.build(0))
    assert {site: site_truth.count for site, site_truth in truth.sites.items()} == {
        "embed": 40,
        "identity": 10,
        "unembed": 40,
    }
    assert truth.sites["embed"].axis == "in" and truth.sites["unembed"].axis == "out"
    assert truth.sites["identity"].axis is None and bool(truth.sites["identity"].pattern.all())
    assert truth.probe.shape == (40, 1, 40)
    assert torch.equal(truth.probe[:, 0] > 0, truth.sites["embed"].pattern)
