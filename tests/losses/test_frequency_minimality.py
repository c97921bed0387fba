"""The frequency loss with the batch's count, a fixed one and at a running mean: values and gradients by hand (VPD paper,
"Optimizing for simplicity")."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from tl_vpd.losses import RunningFrequency, frequency_minimality


def test_with_the_batch_as_reference_it_is_the_papers():
    s = torch.tensor([3.0, 8.0, 0.0], dtype=torch.float64)
    paper = (3 * math.log2(1 + 3) + 8 * math.log2(1 + 8)) / 10
    assert float(frequency_minimality(s, 10)) == pytest.approx(paper)
    assert float(frequency_minimality(s, 10, reference=10.0)) == pytest.approx(paper)
    fixed = 0.3 * math.log2(1 + 7 * 0.3) + 0.8 * math.log2(1 + 7 * 0.8)
    assert float(frequency_minimality(s, 10, reference=7.0)) == pytest.approx(fixed)


def test_at_a_running_mean_value_and_slope_are_taken_there():
    s = torch.tensor([3.0, 8.0], dtype=torch.float64, requires_grad=True)
    at = torch.tensor([0.2, 0.5], dtype=torch.float64)
    loss = frequency_minimality(s, 10, reference=4.0, at=at)
    assert float(loss.detach()) == pytest.approx(sum(f * math.log2(1 + 4 * f) for f in (0.2, 0.5)))
    loss.backward()
    slope = [math.log2(1 + 4 * f) + 4 * f / ((1 + 4 * f) * math.log(2)) for f in (0.2, 0.5)]
    assert_close(s.grad, torch.tensor(slope, dtype=torch.float64) / 10)


def test_a_batch_without_real_tokens_costs_nothing():
    s = torch.zeros(2, requires_grad=True)
    loss = frequency_minimality(s, 0)
    loss.backward()
    assert float(loss.detach()) == 0 and s.grad.tolist() == [0, 0]


def test_the_running_mean_is_debiased_and_halves_in_its_half_life():
    running = RunningFrequency(1, half_life=4.0, dtype=torch.float64)
    assert float(running.update(torch.tensor([0.6], dtype=torch.float64))) == pytest.approx(0.6)
    for _ in range(3):
        running.update(torch.zeros(1))
    total = sum(running.beta**k for k in range(5))
    assert float(running.update(torch.zeros(1))) == pytest.approx(0.6 * running.beta**4 / total)
    assert running.beta**4 == pytest.approx(0.5)
    assert running.mean.dtype == torch.float64 and RunningFrequency(1, 4.0).mean.dtype == torch.float32
