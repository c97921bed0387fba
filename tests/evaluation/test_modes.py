from __future__ import annotations

import pytest
import torch

from tl_vpd.evaluation.modes import ROWS, compute_recovered, row_masks
from tl_vpd.site import ConcatenatedAxis

CURVE = [(0, 8.0), (10, 6.0), (20, 4.0), (100, 2.0)]


@pytest.mark.parametrize(
    ("ce", "share"), [(9.0, 0.0), (8.0, 0.0), (7.0, 0.05), (6.0, 0.1), (5.0, 0.15), (3.0, 0.6), (2.0, 1.0), (1.0, 1.0)]
)
def test_compute_recovered_by_hand(ce: float, share: float):
    assert compute_recovered(ce, CURVE) == pytest.approx(share)


def test_compute_recovered_takes_the_first_time_the_curve_got_there():
    assert compute_recovered(5.0, [(0, 8.0), (10, 5.0), (20, 6.0), (40, 4.0)]) == pytest.approx(0.25)


def test_compute_recovered_counts_from_the_start_of_training_where_the_curve_begins_later():
    assert compute_recovered(6.0, CURVE[1:]) == pytest.approx(0.1) == compute_recovered(6.0, CURVE)


def test_rows_mask_as_their_names_say():
    site_axis = ConcatenatedAxis({"blocks.0.mlp.W_in": 4})
    g = torch.tensor([[[0.0, 0.05, 0.3, 1.0]]])
    expected = {
        "unmasked": [1, 1, 1, 1],
        "rounded": [0, 1, 1, 1],
        "rounded_0.1": [0, 0, 1, 1],
        "rounded_0.5": [0, 0, 0, 1],
        "ci": [0.0, 0.05, 0.3, 1.0],
        "zero": [0, 0, 0, 0],
    }
    generator = torch.Generator().manual_seed(0)

    def uniform(n: int) -> torch.Tensor:
        return torch.rand(50, 40, n, generator=generator)

    for row, mask in expected.items():
        site_mask = row_masks(row, g, site_axis, uniform)["blocks.0.mlp.W_in"]
        torch.testing.assert_close(site_mask.mask, torch.tensor([[mask]], dtype=torch.float32))
        assert (site_mask.delta == 0).all()
    stochastic = row_masks("stochastic", g.expand(50, 40, 4), site_axis, uniform)["blocks.0.mlp.W_in"]
    assert (stochastic.mask >= g).all() and (stochastic.mask[..., 3] == 1).all()
    assert stochastic.mask[..., 0].mean() == pytest.approx(0.5, abs=0.02)
    assert stochastic.delta.mean() == pytest.approx(0.5, abs=0.02)
    partial = row_masks("partial", g.expand(50, 40, 4), site_axis, uniform)["blocks.0.mlp.W_in"]
    assert set(partial.mask.unique().tolist()) == {0.0, 1.0} and (partial.delta == 0).all()
    assert (partial.mask[(g > 0).expand(50, 40, 4)] == 1).all()
    assert partial.mask[(g <= 0).expand(50, 40, 4)].mean() == pytest.approx(0.5, abs=0.03)
    assert set(ROWS) == {*expected, "stochastic", "partial"}
