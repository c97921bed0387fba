"""Schedules at their ends, by hand between, and on runs of one step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tl_vpd.training.schedules import cosine, linear, warm_up


def test_cosine_by_hand():
    half = [1, 0.5 + 8**-0.5, 0.5, 0.5 - 8**-0.5, 0]  # (1 + cos π s / 4) / 2
    assert [cosine(s, 5, 0.1) for s in range(5)] == pytest.approx([0.1 + 0.9 * h for h in half])


def test_linear_and_warm_up_by_hand():
    assert [linear(s, 4, 2.0, 0.4) for s in range(5)] == pytest.approx([2.0, 1.6, 1.2, 0.8, 0.4])
    assert [warm_up(s, 100, 0.05) for s in (0, 1, 4, 5, 99)] == pytest.approx([0, 0.2, 0.8, 1, 1])
    assert warm_up(0, 100, 0.0) == 1


@given(st.integers(1, 1000), st.floats(0, 1))
def test_they_start_and_end_where_they_should_and_never_leave_their_range(steps, share):
    assert cosine(0, steps, share) == pytest.approx(1)
    assert cosine(steps + 5, steps, share) == pytest.approx(share)
    values = [cosine(s, steps, share) for s in range(0, steps, max(1, steps // 7))]
    assert values == sorted(values, reverse=True) and all(share - 1e-9 <= v <= 1 + 1e-9 for v in values)
    assert linear(steps + 5, steps, 2.0, 0.4) == pytest.approx(0.4)
    assert all(0 <= warm_up(s, steps, share) <= 1 for s in (0, steps // 2, steps))
