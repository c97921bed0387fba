"""Compressed computation: the residual MLP against NumPy, what it learns, what is true of it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import tl_vpd
from tl_vpd.adapters import adapt
from tl_vpd.evaluation.ground_truth import ground_truth
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
    ("name", "counts"),
    [("compressed", [100, 50]), ("compressed_2", [100, 25, 101, 25]), ("compressed_3", [102, 17, 103, 17, 103, 17])],
)
def test_the_truth_has_a_subcomponent_a_feature_in_w_in_and_one_a_neuron_in_w_out(name, counts):
    toy = TOYS[name]
    model = toy.build(0)
    truth = toy.truth(model)
    assert [site_truth.count for site_truth in truth.sites.values()] == counts
    assert list(truth.sites) == tl_vpd.sites(model)["site"].tolist()
    _, cache = model.run_with_cache(truth.probe)
    for site, site_truth in truth.sites.items():
        if site.endswith("W_in"):
            features = toy.n_features
            assert not site_truth.whole and torch.equal(site_truth.pattern[:, :features], torch.eye(features).bool())
            assert torch.equal(site_truth.either.any(0), torch.arange(site_truth.count) >= features)
            continue
        assert site_truth.whole and torch.equal(site_truth.pattern, cache[site.replace("W_out", "hook_post")][:, 0] > 0)
        # Later layers read the stream as well as the unembedding.
        assert site_truth.visible.shape[1] == toy.n_features + toy.neurons * (
            toy.n_layers - 1 - int(site.split(".")[1])
        )
        assert bool((site_truth.either & ~site_truth.pattern).sum() == 0) and 0 < int(site_truth.either.sum()) < int(
            site_truth.pattern.sum()
        )
    data = toy.batches(1).at(0)
    assert data.shape == (1, 64, toy.n_features) and data.min() < 0


def test_behind_the_first_layer_a_direction_is_what_features_write_in_common():
    model = train(SMALL, 0)
    W_E, W_in, W_out = (
        w.detach().double().numpy() for w in (model.W_E, model.layers[0].W_in.weight.T, model.layers[0].W_out.weight.T)
    )
    common = (np.maximum(0.75 * W_E @ W_in, 0) @ W_out).mean(0)
    known = SMALL.truth(model).sites["layers.1.W_in"]
    assert known.count == 13
    assert_close(known.basis[-1], torch.from_numpy(common).float(), atol=1e-5, rtol=1e-4)
    assert torch.equal(known.basis[:-1], model.W_E)


class Known:
    """The truth as pieces, and what the masked model puts out."""

    def __init__(self, model, truth):
        self.model, self.truth = model, truth
        self.W = {site: adapt(model).weight(site) for site in truth.sites}
        self.features = torch.linalg.pinv(model.W_E)

    def pieces(self, site):
        W = self.W[site]
        if site.endswith("W_out"):
            return torch.stack([torch.diag(neuron) @ W for neuron in torch.eye(len(W))])
        return torch.einsum("if, fj, jo -> fio", self.features, self.model.W_E, W)

    def importances(self, inputs):
        _, cache = self.model.run_with_cache(inputs)
        on = {site: cache[site.replace("W_out", "hook_post")] > 0 for site in self.truth.sites if "W_out" in site}
        return {site: on[site].float() if site in on else (inputs != 0).float() for site in self.truth.sites}

    def output(self, inputs, masks):
        h = inputs @ self.model.W_E
        for layer in range(len(self.model.layers)):
            site_names = [f"layers.{layer}.{name}" for name in ("W_in", "W_out")]
            W_in, W_out = (torch.einsum("bpn, nio -> bpio", masks[site], self.pieces(site)) for site in site_names)
            h = h + ((h[..., None, :] @ W_in).relu() @ W_out)[..., 0, :]
        return h @ self.model.W_E.T


def test_the_truth_of_one_layer_scores_as_true_and_nothing_is_lost_by_it():
    toy = dataclasses.replace(SMALL, n_layers=1)
    model = train(toy, 0)
    truth = toy.truth(model)
    result = ground_truth(Known(model, truth), model, toy.batches(4, seed=3).at(0), truth)
    rows = result.sites.set_index("site")
    assert (rows["alive"] == rows["true"]).all()
    assert (rows[["pattern_errors", "count_errors"]] == 0).all(axis=None)
    assert rows[["mmcs", "ml2r"]].to_numpy() == pytest.approx(np.ones((2, 2)), abs=1e-4)
    # Features are read along dual directions, so that the piece of an absent one reads 0: nothing is lost, whatever the masks.
    assert max(result.reconstruction[mode] for mode in ("unmasked", "importances", "adversarial")) < 1e-8
    assert result.reconstruction["zero"] > 1e-3
