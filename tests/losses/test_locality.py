"""Locality by hand, and the sites that it counts."""

from __future__ import annotations

import pytest
import torch

from tl_vpd.components import Components
from tl_vpd.losses import locality
from tl_vpd.losses.locality import units_of, units_used
from tl_vpd.site import Site

Q = Site("blocks.0.attn.W_Q", 3, 4, n_heads=2, d_head=2)
IN, OUT = Site("blocks.0.mlp.W_in", 3, 2), Site("blocks.0.mlp.W_out", 2, 3)


def test_units_are_heads_and_neurons():
    assert [units_of(site) for site in (Q, IN, OUT, Site("embed", 5, 2))] == [2, 2, None, None]
    assert units_of(Site("blocks.0.attn.W_O", 4, 3, n_heads=2, d_head=2)) is None


def test_the_number_of_units_by_hand():
    U = torch.tensor([[3.0, 4.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    # Heads: f = (1, 0) and (1/2, 1/2), t/N = 1/4.
    assert units_used(U, 2, 0.5).tolist() == pytest.approx([1 / 1.25, 2 * 0.5 / 0.75, 0])
    # Neurons: f = (0.36, 0.64, 0, 0) and quarters, t/N = 1/4.
    assert units_used(U, 4, 1.0).tolist() == pytest.approx([0.36 / 0.61 + 0.64 / 0.89, 4 * 0.5, 0])
    assert units_used(7 * U, 4, 1.0).tolist() == pytest.approx(units_used(U, 4, 1.0).tolist())


def test_the_loss_is_a_mean_over_subcomponents_of_the_sites_with_units_and_moves_their_u_alone():
    components = Components([Q, IN, OUT], {Q.name: 3, IN.name: 1, OUT.name: 9})
    with torch.no_grad():
        components.U[Q.name].copy_(torch.eye(4)[:3])  # one head each
        components.U[IN.name].copy_(torch.tensor([[1.0, 1.0]]))
    loss = locality(components, 1.0)  # t/N = 1/2
    assert loss.item() == pytest.approx((3 * (1 / 1.5) + 2 * 0.5) / 4)
    loss.backward()
    assert components.U[OUT.name].grad is None and components.V[Q.name].grad is None
    assert bool(components.U[Q.name].grad.isfinite().all())


def test_a_row_of_zeros_has_finite_gradients():
    U = torch.zeros(2, 4, requires_grad=True)
    units_used(U, 4, 0.25).sum().backward()
    assert torch.equal(U.grad, torch.zeros(2, 4))


def test_sites_without_units_are_refused():
    message = r"No site writes to heads or neurons \(blocks.0.mlp.W_out\), so .*: set coefficients.locality to 0"
    with pytest.raises(ValueError, match=message):
        locality(Components([OUT], {OUT.name: 2}), 1.0)
