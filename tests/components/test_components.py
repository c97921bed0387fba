"""V, U and Δ of a site."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tl_vpd.components import Components
from tl_vpd.site import Site

SITES = [Site("blocks.0.attn.W_Q", 100, 80), Site("blocks.0.mlp.W_in", 50, 60)]


def test_shapes_follow_sites_and_counts_and_the_spread_is_the_papers():
    parts = Components(SITES, {s.name: 400 for s in SITES}, generator=torch.Generator().manual_seed(0))
    for site in SITES:
        V, U = parts.V[site.name], parts.U[site.name]
        assert V.shape == (site.d_in, 400) and U.shape == (400, site.d_out)
        assert_close(V.std().item(), site.d_in**-0.5, rtol=0.02, atol=0)
        assert_close(U.std().item(), 400**-0.5, rtol=0.02, atol=0)
    assert list(parts.V) == [s.name for s in SITES] and len(parts.U) == 2


def test_delta_and_write_norms_by_hand():
    parts = Components([Site("blocks.0.mlp.W_in", 2, 2)], {"blocks.0.mlp.W_in": 2})
    with torch.no_grad():
        parts.V["blocks.0.mlp.W_in"].copy_(torch.tensor([[1.0, 0.0], [2.0, 1.0]]))
        parts.U["blocks.0.mlp.W_in"].copy_(torch.tensor([[3.0, 4.0], [0.0, -2.0]]))
    delta = parts.delta("blocks.0.mlp.W_in", torch.tensor([[10.0, 10.0], [10.0, 10.0]]))
    assert delta.tolist() == [[7.0, 6.0], [4.0, 4.0]]
    assert parts.write_norms("blocks.0.mlp.W_in").tolist() == [5.0, 2.0]


def test_a_generator_decides_the_start():
    first, again, other = (
        Components(SITES, {s.name: 3 for s in SITES}, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    name = SITES[0].name
    assert torch.equal(first.V[name], again.V[name]) and not torch.equal(first.V[name], other.V[name])


def test_a_site_without_subcomponents_is_refused():
    with pytest.raises(ValueError, match=r"C of blocks\.0\.mlp\.W_in is 0"):
        Components(SITES, {SITES[0].name: 4, SITES[1].name: 0})
