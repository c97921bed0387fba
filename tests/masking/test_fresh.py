"""Fresh PGD on losses whose maximum is known (VPD paper, section on evaluation)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.tiny import draw
from tl_vpd.masking import Masks, attacked_masks, fresh_pgd, restarted_pgd
from tl_vpd.site import ConcatenatedAxis

SLOPE = torch.tensor([[[1.0, -2.0, 0.5, 0.0]]], dtype=torch.float64)


def linear(sources):
    return (sources * SLOPE).sum()


def test_a_linear_loss_is_driven_to_its_corner_within_the_default_budget():
    start = draw(1, 1, 4)
    result = fresh_pgd(linear, start)
    assert torch.equal(result.sources[..., :3], torch.tensor([[[1.0, 0.0, 1.0]]], dtype=torch.float64))
    assert torch.equal(result.sources[..., 3], start[..., 3])  # no gradient, no step
    assert len(result.losses) == 21 and result.loss == 1.5
    assert result.losses[0] == float(linear(start))


def test_steps_are_signs_times_size_and_are_clamped():
    start = torch.tensor([[[0.5, 0.5, 0.95, 0.5]]], dtype=torch.float64)
    result = fresh_pgd(linear, start, steps=2, step_size=0.1)
    assert_close(result.sources, torch.tensor([[[0.7, 0.3, 1.0, 0.5]]], dtype=torch.float64))
    assert start.tolist() == [[[0.5, 0.5, 0.95, 0.5]]]


def test_no_steps_score_the_start():
    result = fresh_pgd(linear, draw(1, 1, 4), steps=0)
    assert torch.equal(result.sources, draw(1, 1, 4)) and result.losses == [float(linear(draw(1, 1, 4)))]


def test_a_loss_that_runs_its_backward_piecewise_gives_the_same_attack():
    def piecewise(sources):
        total = 0.0
        for i in range(4):
            part = (sources[..., i] * SLOPE[..., i]).sum()
            if torch.is_grad_enabled():
                part.backward()
            total = total + part.detach()
        return total

    whole, pieces = (fresh_pgd(loss, draw(1, 1, 4), steps=3) for loss in (linear, piecewise))
    assert torch.equal(whole.sources, pieces.sources)
    assert whole.losses == pytest.approx(pieces.losses, abs=1e-15)


def test_it_works_where_gradients_are_off():
    with torch.no_grad():
        assert fresh_pgd(linear, draw(1, 1, 4)).loss == 1.5


def test_momentum_by_hand():
    # The gradient turns from +1 to −1 at 0.55; unit gradients summed with μ = 0.9 go on upwards for a step, plain ones do not.
    def peak(sources):
        return -(sources - 0.55).abs().sum()

    start = torch.tensor([[[0.5]]], dtype=torch.float64)
    plain = fresh_pgd(peak, start, steps=3, step_size=0.1)
    assert_close(plain.sources, torch.tensor([[[0.6]]], dtype=torch.float64))  # 0.6, 0.5, 0.6
    pushed = fresh_pgd(peak, start, steps=3, step_size=0.1, momentum=0.9)
    # v: 1, 0.9 − 1 < 0, −0.09 − (…): 0.6, 0.5, then v = 0.9·(−0.1) + 1 > 0: 0.6
    assert_close(pushed.sources, torch.tensor([[[0.6]]], dtype=torch.float64))
    two = torch.tensor([[[0.30, 0.5]]], dtype=torch.float64)
    # Two coordinates: the first goes up twice (v = 1, 1.9) and once more after its gradient has turned (v = 0.71).
    climbed = fresh_pgd(lambda s: -(s[..., 0] - 0.45).abs().sum(), two, steps=3, step_size=0.1, momentum=0.9)
    assert_close(climbed.sources[0, 0, 0], torch.tensor(0.6, dtype=torch.float64))
    assert_close(
        fresh_pgd(lambda s: -(s[..., 0] - 0.45).abs().sum(), two, steps=3, step_size=0.1).sources[0, 0, 0],
        torch.tensor(0.4, dtype=torch.float64),
    )


def test_no_momentum_is_the_plain_attack_to_the_bit():
    plain, zero = (fresh_pgd(linear, draw(1, 1, 4), steps=3, **more) for more in ({}, {"momentum": 0.0}))
    assert torch.equal(plain.sources, zero.sources) and plain.losses == zero.losses
    with pytest.raises(ValueError, match="momentum=1: give a number"):
        fresh_pgd(linear, draw(1, 1, 4), momentum=1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "steps=-1: give an integer of at least 0"),
        ({"step_size": 0.0}, "step_size=0.0: give a finite number above 0"),
        ({"step_size": float("nan")}, "step_size=nan"),
        ({"momentum": -0.1}, "momentum=-0.1: give a finite number from 0 to 1"),
    ],
)
def test_an_attack_that_is_none_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fresh_pgd(linear, draw(1, 1, 4), **options)


@pytest.mark.parametrize("entry", [float("nan"), float("inf"), -0.1, 1.1])
def test_sources_that_no_mask_has_are_refused(entry):
    start = draw(1, 1, 4)
    start[..., 2] = entry
    with pytest.raises(ValueError, match=r"sources are in \[0, 1\]"):
        fresh_pgd(linear, start)


def test_the_worst_start_comes_first():
    def two_hills(sources):
        return torch.where(sources > 0.5, 2 * (sources - 0.5), 0.5 - sources).sum()

    starts = [torch.full((1, 1, 1), value, dtype=torch.float64) for value in (0.3, 0.7, 0.1)]
    result = restarted_pgd(two_hills, starts, steps=10)
    assert [r.loss for r in result] == pytest.approx([1.0, 0.5, 0.5])
    with pytest.raises(ValueError, match="no start"):
        restarted_pgd(two_hills, [])


def test_gradients_of_a_mean_over_many_tokens_are_followed_in_half_precision():
    site_axis, slope = ConcatenatedAxis({"a": 3}), torch.tensor([3e-5, -3e-5, 3e-5], dtype=torch.float16)
    g = torch.zeros(8, 1024, 3)  # of a token the loss has a gradient of 4e-9, where float16 has nothing below 6e-8

    def loss(masks: Masks) -> Tensor:
        return (masks["a"].mask.half() * slope).sum(-1).float().mean()

    masks = attacked_masks(g, site_axis, loss, steps=4, generator=torch.Generator().manual_seed(0))
    assert masks["a"].mask[0, 0].tolist() == [1, 0, 1]
