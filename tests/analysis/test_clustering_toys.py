"""Clustering where the groups are known: the toys' true importances; each subcomponent is important where it is needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Bool
from torch import Tensor

from tl_vpd.analysis.clustering import ClusterConfig, Clustering, Patterns, variation_of_information
from tl_vpd.analysis.clustering.cluster import clustered
from tl_vpd.site import ConcatenatedAxis
from tl_vpd.toys.compressed import Compressed
from tl_vpd.toys.features import SparseFeatures
from tl_vpd.toys.induction import Repeated, mechanism
from tl_vpd.toys.tms import TMS
from tl_vpd.toys.toy import train

CONFIG = ClusterConfig(alpha=3.0, greed=60.0)


def patterns(needed: Mapping[str, Bool[Tensor, "row pos C"]]) -> Patterns:
    """Of sites' subcomponents, where each is needed."""
    axis = ConcatenatedAxis({site: mask.shape[-1] for site, mask in needed.items()})
    whole = torch.cat(list(needed.values()), dim=-1)
    n_rows, n_pos, _ = whole.shape
    matrix = scipy.sparse.csc_matrix(whole.flatten(0, 1).numpy())
    return Patterns(matrix, np.arange(axis.total), axis, 0.01, np.full(n_rows, n_pos))


def together(clustering: Clustering, *addresses: str) -> bool:
    """Whether they are in one component."""
    return len({clustering.of(address).number for address in addresses}) == 1


def test_features_of_tms_and_the_ranks_of_its_identity():
    toy = TMS(n_features=8, n_hidden=4, identity=True, probability=0.05)
    truth = toy.truth(toy.build())
    on = SparseFeatures(8, 0.05, 40, 32).at(0) > 0
    needed = {name: (on.float() @ site.pattern.float()) > 0 for name, site in truth.sites.items()}
    of_features = {name: f"blocks.0.mlp.{name}" for name in needed}
    made = patterns({of_features[name]: mask for name, mask in needed.items()})
    clustering = clustered(made, CONFIG)
    expected = [*range(8), *[8] * 4, *range(8)]  # embed and unembed of each feature, and the identity's ranks
    assert variation_of_information(clustering.partition, expected) == 0
    only = patterns({of_features[name]: needed[name] for name in ("embed", "unembed")})
    assert max(len(component) for component in clustered(only.shuffled(), CONFIG)) == 1


def test_features_of_compressed_computation_across_layers():
    toy = Compressed(n_features=12, d_resid=40, neurons=6, n_layers=2, probability=0.04)
    truth = toy.truth(toy.build())
    on = SparseFeatures(12, 0.04, 40, 32).at(0) != 0
    sites = {f"layers.{i}.W_in": truth.sites[f"layers.{i}.W_in"].pattern[:, :12] for i in range(2)}
    clustering = clustered(patterns({n: (on.float() @ p.float()) > 0 for n, p in sites.items()}), CONFIG)
    assert variation_of_information(clustering.partition, [*range(12), *range(12)]) == 0


def test_w_out_of_compressed_computation_is_one_piece():
    toy = Compressed(n_features=30, d_resid=60, neurons=15, probability=1 / 60, vectors=32)
    model, x = train(toy, steps=200), toy.batches(64, seed=5).at(0)
    _, cache = model.run_with_cache(x)
    needed = {"layers.0.W_in": x != 0, "layers.0.W_out": cache["layers.0.hook_post"] > 0}
    made = patterns(needed)
    assert variation_of_information(clustered(made, CONFIG).partition, [*range(30), *[30] * 15]) == 0
    # Each neuron is on for about half of the features; if they were on as often at random, each would be alone.
    assert len(set(clustered(made.shuffled(), CONFIG).partition[30:].tolist())) == 15


def test_induction_needs_a_lag():
    tokens = Repeated(d_vocab=33, context=33, shortest=6, longest=16, batch_size=40).at(0)
    needed = {site: mask[..., None].expand(-1, -1, 2) for site, mask in mechanism(tokens).items()}
    made = patterns(needed)
    previous = [f"blocks.{layer}.attn.W_{name}:{i}" for layer, name in ((0, "Q"), (0, "O"), (1, "V")) for i in (0, 1)]
    sources = ["blocks.0.attn.W_V:0", "blocks.0.attn.W_V:1"]
    # Sources are runs of tokens, so that copy places are sources too but for the ends of runs: only a large α tells them apart.
    config = ClusterConfig(alpha=20.0, greed=60.0)
    without = clustered(made, config)
    assert together(without, *previous) and together(without, *sources)
    assert not together(without, previous[0], sources[0])
    across = clustered(made, replace(config, lags=1))
    assert together(across, *previous, *sources)  # what moves a token's identity to the next one
    component = across.of(sources[0])
    lags = dict(zip(map(str, component), component.lags, strict=True))
    assert {lags[address] for address in sources} == {1} and {lags[address] for address in previous} == {0}
    for other in ("blocks.1.attn.W_Q:0", "blocks.1.attn.W_O:0"):  # of the second layer's copying
        assert not together(across, previous[0], other)
