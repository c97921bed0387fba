"""Smooth L0, the frequency loss with a reference count and at a running mean: values and gradients by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from tl_vpd.importance import lower_leaky, upper_leaky
from tl_vpd.losses import Penalty, RunningFrequency, faithfulness, frequency_minimality, penalty_sums
from tl_vpd.losses import minimality as module


def smooth_sums(z, gamma, token_mask=None):
    return penalty_sums(z, Penalty("smooth_l0", gamma), token_mask)


def power_sums(z, p, token_mask=None):
    return penalty_sums(z, Penalty("power", p), token_mask)


def values(seed=0, shape=(3, 50, 4)):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 1.5


@pytest.mark.parametrize("gamma", [1.0, 0.3, 0.01])
def test_smooth_sums_and_their_gradient_are_those_of_the_formula(gamma):
    z, plain = (values().requires_grad_() for _ in range(2))
    token_mask = torch.rand(3, 50, generator=torch.Generator().manual_seed(1)) < 0.7
    sums, n = smooth_sums(z, gamma, token_mask)
    # upper_leaky by hand, so that autograd gives the expected gradient
    g = torch.where(plain > 1, 1 + 0.01 * (plain - 1), plain.clamp(0, 1))
    expected = (g.square() / (g.square() + gamma**2))[token_mask].sum(0)
    assert n == int(token_mask.sum())
    assert_close(sums, expected)
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    (sums * weights).sum().backward()
    (expected * weights).sum().backward()
    assert_close(z.grad, plain.grad)
    assert bool((z.grad[~token_mask] == 0).all()) and bool((z.grad[token_mask] != 0).any())


def test_smooth_l0_counts_what_is_above_gamma():
    z = torch.tensor([[[0.0, 1.0, 0.01, -3.0]]], dtype=torch.float64)
    assert_close(smooth_sums(z, 0.01)[0], torch.tensor([0.0, 1 / (1 + 1e-4), 0.5, 0.0], dtype=torch.float64))


def test_the_frequency_loss_with_the_batch_as_reference_is_the_papers():
    z = values()
    s, n = power_sums(z, 0.7)
    paper = float((s * (1 + s).log2()).sum() / n)
    assert float(frequency_minimality(s, n)) == pytest.approx(paper)
    assert float(frequency_minimality(s, n, reference=float(n))) == pytest.approx(paper)
    assert float(frequency_minimality(s, n, reference=7.0)) == pytest.approx(
        float((s / n * (1 + 7 * s / n).log2()).sum())
    )


def test_at_a_running_mean_value_and_slope_are_taken_there():
    s = torch.tensor([3.0, 8.0], dtype=torch.float64, requires_grad=True)
    at = torch.tensor([0.2, 0.5], dtype=torch.float64)
    loss = frequency_minimality(s, 10, reference=4.0, at=at)
    assert float(loss.detach()) == pytest.approx(sum(f * math.log2(1 + 4 * f) for f in (0.2, 0.5)))
    loss.backward()
    slope = [math.log2(1 + 4 * f) + 4 * f / ((1 + 4 * f) * math.log(2)) for f in (0.2, 0.5)]
    assert_close(s.grad, torch.tensor(slope, dtype=torch.float64) / 10)


def test_the_running_mean_is_debiased_and_halves_in_its_half_life():
    running = RunningFrequency(1, half_life=4.0)
    assert float(running.update(torch.tensor([0.6]))) == pytest.approx(0.6)
    for _ in range(3):
        running.update(torch.tensor([0.0]))
    weights = [running.beta**k for k in (3, 2, 1, 0)]
    assert float(running.update(torch.tensor([0.0]))) == pytest.approx(
        0.6 * running.beta**4 / sum([*weights, running.beta**4]), rel=1e-5
    )
    assert running.beta**4 == pytest.approx(0.5)


def test_relative_faithfulness_is_each_sites_own_share(vpd):
    generator = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(s.d_in, s.d_out, generator=generator, dtype=torch.float64) for n, s in vpd.sites.items()}
    shares = [(W - vpd.V[n] @ vpd.U[n]).square().sum() / W.square().sum() for n, W in weights.items()]
    assert_close(faithfulness(vpd.components, weights, relative=True), torch.stack(shares).mean())


def test_upper_leakys_slope_is_used_above_one():
    z = torch.tensor([[[2.0]]], dtype=torch.float64, requires_grad=True)
    smooth_sums(z, 1.0)[0].sum().backward()
    g = float(upper_leaky(z.detach()))
    assert float(z.grad) == pytest.approx(0.01 * 2 * g / (g * g + 1) ** 2)


@pytest.mark.parametrize("block", [1 << 16, 8])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("penalty", [Penalty("power", 0.7), Penalty("power", 2.0), Penalty("smooth_l0", 0.3)])
def test_the_pullback_is_autograds_through_both_squashings(penalty, kept, block, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", block)
    z = values(shape=(30, 5)).requires_grad_()
    token_mask = torch.rand(30, generator=torch.Generator().manual_seed(1)) < 0.7 if kept else None
    of_g, of_sums = values(1, (30, 5)), values(2, (5,))
    g = upper_leaky(z)
    counted = (g + 1e-12) ** penalty.parameter if penalty.kind == "power" else g**2 / (g**2 + penalty.parameter**2)
    counted = (counted if token_mask is None else counted[token_mask]).sum(0)
    assert_close(penalty.sums(z.detach(), token_mask), counted)
    torch.autograd.backward([lower_leaky(z), counted], [of_g, of_sums])
    assert_close(penalty.pullback(z.detach(), of_sums, token_mask, of_g=of_g.clone()), z.grad)
