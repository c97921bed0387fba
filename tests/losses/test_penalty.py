"""Both penalties summed over tokens: values and gradients by hand and by autograd through both squashings (VPD
paper, "Optimizing for minimality")."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from tests.losses.penalty_sums import penalty_sums
from tl_vpd.importance import lower_leaky, upper_leaky
from tl_vpd.losses import Penalty, importance_minimality

PENALTIES = [
    Penalty("power", 0.7), Penalty("power", 2.0), Penalty("smooth_l0", 0.3), Penalty("smooth_l0", 0.3, normalised=True)
]  # fmt: skip


def values(seed=0, shape=(3, 50, 4)):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 1.5


def mask(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) < 0.7


def by_definition(g, penalty):
    a = penalty.parameter
    smooth = g**2 / (g**2 + a**2) * (1 + a**2 if penalty.normalised else 1)
    return (g + 1e-12) ** a if penalty.kind == "power" else smooth


@pytest.mark.parametrize("parameter", [1.0, 0.3, 0.01])
@pytest.mark.parametrize("kind", ["power", "smooth_l0"])
def test_sums_and_their_gradient_are_those_of_the_formula(kind, parameter):
    z, z_by_hand = (values().requires_grad_() for _ in range(2))
    token_mask, penalty = mask(3, 50), Penalty(kind, parameter)
    sums, n = penalty_sums(z, penalty, token_mask)
    # upper_leaky by hand, so that autograd gives the expected gradient
    g = torch.where(z_by_hand > 1, 1 + 0.01 * (z_by_hand - 1), z_by_hand.clamp(0, 1))
    expected = by_definition(g, penalty)[token_mask].sum(0)
    assert n == int(token_mask.sum())
    assert_close(sums, expected)
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    (sums * weights).sum().backward()
    (expected * weights).sum().backward()
    assert_close(z.grad, z_by_hand.grad)
    assert bool((z.grad[~token_mask] == 0).all()) and bool((z.grad[token_mask] != 0).any())


def test_smooth_l0_counts_what_is_above_gamma():
    z = torch.tensor([[[0.0, 1.0, 0.01, -3.0]]], dtype=torch.float64)
    sums = penalty_sums(z, Penalty("smooth_l0", 0.01))[0]
    assert_close(sums, torch.tensor([0.0, 1 / (1 + 1e-4), 0.5, 0.0], dtype=torch.float64))


def test_the_slope_of_upper_leaky_is_used_above_one():
    z = torch.tensor([[[2.0]]], dtype=torch.float64, requires_grad=True)
    penalty_sums(z, Penalty("smooth_l0", 1.0))[0].sum().backward()
    g = float(upper_leaky(z.detach()))
    assert float(z.grad) == pytest.approx(0.01 * 2 * g / (g * g + 1) ** 2)


@pytest.mark.parametrize("block", [1 << 16, 8])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_the_pullback_is_autograds_through_both_squashings(penalty, padded, block):
    z = values(shape=(30, 5)).requires_grad_()
    token_mask = mask(30) if padded else None
    grad_g, grad_sums = values(1, (30, 5)), values(2, (5,))
    penalties = by_definition(upper_leaky(z), penalty)
    sums = (penalties if token_mask is None else penalties[token_mask]).sum(0)
    blocked = replace(penalty, block=block)
    assert_close(blocked.sums(z.detach(), token_mask), sums)
    torch.autograd.backward([lower_leaky(z), sums], [grad_g, grad_sums])
    assert_close(blocked.pullback(z.detach(), grad_sums, token_mask, grad_g=grad_g.clone()), z.grad)


def test_importance_minimality_is_the_mean_over_real_tokens_of_summed_penalties():
    # One row of two real tokens and one padded: g = (½, 1), (1, 0) and (1, 1); with p = 2 each token sums to 1.25 and 1.
    z = torch.tensor([[[0.5, 1.0], [1.0, 0.0], [1.0, 1.0]]], dtype=torch.float64)
    loss = importance_minimality(*penalty_sums(z, Penalty("power", 2.0), torch.tensor([[True, True, False]])))
    assert float(loss) == pytest.approx((1.25 + 1) / 2)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_padding_alone_counts_as_nothing(penalty):
    z = values(shape=(2, 3, 4)).requires_grad_()
    loss = importance_minimality(*penalty_sums(z, penalty, torch.zeros(2, 3, dtype=torch.bool)))
    loss.backward()
    assert float(loss.detach()) == 0 and bool((z.grad == 0).all())


def test_smooth_l0_normalised_is_1_at_1_and_power_is_already():
    for gamma in (0.01, 0.5, 2.0):
        values = Penalty("smooth_l0", gamma, normalised=True).value(torch.tensor([0.0, 0.5, 1.0]))
        assert values.tolist() == pytest.approx([0, (1 + gamma**2) * 0.25 / (0.25 + gamma**2), 1])
    with pytest.raises(ValueError, match="normalised=True goes with kind='smooth_l0'"):
        Penalty("power", 1.0, normalised=True)
