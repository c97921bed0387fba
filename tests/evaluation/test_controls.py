from __future__ import annotations

import torch
from torch.testing import assert_close

from tl_vpd.evaluation.controls import (
    hand_over,
    random_importances,
    shuffled_importances,
    singular_components,
    singular_importances,
)
from tl_vpd.site import ConcatenatedAxis, Site

IN, OUT = "blocks.0.mlp.W_in", "blocks.0.mlp.W_out"


def test_hand_over_by_hand():
    values = torch.tensor([[[0.2, 0.0, 0.9]]])
    strength = torch.tensor([[[5.0, 7.0, 1.0, 6.0]]])
    assert_close(hand_over(values, strength), torch.tensor([[[0.0, 0.9, 0.0, 0.2]]]))


def test_hand_over_to_fewer_pieces_drops_the_smallest():
    values = torch.tensor([[[0.3, 0.5, 0.1]]])
    assert_close(hand_over(values, torch.tensor([[[1.0, 2.0]]])), torch.tensor([[[0.3, 0.5]]]))


def test_random_importances_keep_each_sites_values_and_spare_the_dead():
    site_axis = ConcatenatedAxis({IN: 6, OUT: 4})
    g = torch.rand(2, 3, 10).clamp_min(0.3) * (torch.rand(2, 3, 10) > 0.6)
    alive = torch.ones(10, dtype=torch.bool)
    g[..., 5], alive[5] = 0.0, False
    found = random_importances(g, alive, site_axis, torch.Generator().manual_seed(0))
    for name in site_axis.names:
        own, theirs = site_axis.split_sites(found)[name], site_axis.split_sites(g)[name]
        assert_close(own.sort(-1).values, theirs.sort(-1).values)
    assert (found[..., 5] == 0).all()
    assert not torch.equal(found, g)


def test_singular_directions_sum_to_the_weight_and_the_strongest_is_kept():
    W = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    parts = singular_components({IN: Site(IN, 3, 3)}, {IN: W})
    assert_close(parts.V[IN] @ parts.U[IN], W, atol=1e-6, rtol=0)
    # x has 1 along the second direction (strength 2) and 0.5 along the first (strength 1.5).
    x = torch.tensor([[[0.5, 1.0, 0.0]]])
    g = torch.tensor([[[0.0, 0.0, 0.0, 0.7]]])
    found = singular_importances(g, ConcatenatedAxis({IN: 4}), {IN: x}, parts)
    assert_close(found, torch.tensor([[[0.0, 0.7, 0.0]]]))


def test_shuffled_importances_stay_whole_and_leave_padding():
    g = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(0))
    token_mask = torch.tensor([[True, True, True, False], [True, True, False, False]])
    g = g * token_mask[..., None]
    found = shuffled_importances(g, token_mask, torch.Generator().manual_seed(1))
    assert (found[~token_mask] == 0).all()
    assert sorted(found[token_mask].tolist()) == sorted(g[token_mask].tolist())  # rows of values, each still together
    assert not torch.equal(found, g)
