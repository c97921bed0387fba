"""Schedules at their ends, by hand between, and on runs of one step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tl_vpd import VPDConfig
from tl_vpd.training.knots import at
from tl_vpd.training.schedules import Schedule, cosine, warm_up


def test_cosine_by_hand():
    half = [1, 0.5 + 8**-0.5, 0.5, 0.5 - 8**-0.5, 0]  # (1 + cos π s / 4) / 2
    assert [cosine(s, 5, 0.1) for s in range(5)] == pytest.approx([0.1 + 0.9 * h for h in half])


def test_a_cosine_may_end_before_the_run():
    assert [cosine(s, 9, 0.1, 0.5) for s in range(9)] == pytest.approx(
        [cosine(s, 5, 0.1) for s in range(5)] + 4 * [0.1]
    )


def test_knots_and_warm_up_by_hand():
    assert [at(((0.0, 2.0), (1.0, 0.4)), s, 4) for s in range(5)] == pytest.approx([2.0, 1.6, 1.2, 0.8, 0.4])
    held = ((0.2, 3.0), (0.4, 1.0), (0.8, 2.0))
    assert [at(held, s, 10) for s in range(11)] == pytest.approx([3, 3, 3, 2, 1, 1.25, 1.5, 1.75, 2, 2, 2])
    assert at(((0.5, 7.0),), 3, 10) == 7
    assert [warm_up(s, 100, 0.05) for s in (0, 1, 4, 5, 99)] == pytest.approx([0, 0.2, 0.8, 1, 1])
    assert warm_up(0, 100, 0.0) == 1


@given(st.integers(1, 1000), st.floats(0, 1))
def test_they_start_and_end_where_they_should_and_never_leave_their_range(steps, share):
    assert cosine(0, steps, share) == pytest.approx(1)
    assert cosine(steps + 5, steps, share) == pytest.approx(share)
    values = [cosine(s, steps, share) for s in range(0, steps, max(1, steps // 7))]
    assert values == sorted(values, reverse=True) and all(share - 1e-9 <= v <= 1 + 1e-9 for v in values)
    assert at(((0.0, 2.0), (1.0, 0.4)), steps + 5, steps) == pytest.approx(0.4)
    assert all(0 <= warm_up(s, steps, share) <= 1 for s in (0, steps // 2, steps))


def test_what_a_config_schedules_by_hand():
    config = VPDConfig(
        steps=100,
        minimality={"p": ((0.1, 2.0), (1, 0.2))},
        optimizer={"lr_final": 0.2, "lr_decay": 0.5, "lr_schedule": ((0, 0), (0.1, 1))},
        coefficients={"adversarial": 0.5, "locality": 1.0, "schedule": {"importance": ((0.5, 1), (1, 0)), "delta": 3}},
        adversary={"start": 0.2, "warm_up": 0.1, "lr": 0.04},
    )
    early, late = Schedule.at(10, config), Schedule.at(75, config)
    assert (early.p, late.p) == pytest.approx((2.0, 0.7)) and (early.locality, late.locality) == (7.225, 2.1875)
    assert early.rate == pytest.approx(cosine(10, 100, 0.2, 0.5)) and late.rate == pytest.approx(0.2)
    assert Schedule.at(5, config).rate == pytest.approx(cosine(5, 100, 0.2, 0.5) / 2)
    assert (early.coefficients.delta, late.coefficients.delta) == (3e7, 3e7)
    assert (early.coefficients.importance, late.coefficients.importance) == (2e-4, 1e-4)
    assert [Schedule.at(s, config).coefficients.adversarial for s in (0, 19, 20, 99)] == [0, 0, 0.5, 0.5]
    assert [Schedule.at(s, config).adversary_lr for s in (20, 25, 30, 99)] == pytest.approx([0, 0.02, 0.04, 0.04])
