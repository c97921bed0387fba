"""Intervals over rows: against the normal approximation, and in the cases where there is none."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_vpd.evaluation.intervals import PerRow, interval_of_largest


def test_the_interval_of_many_rows_is_the_normal_one():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    low, high = PerRow(values, np.ones(400)).interval(resamples=4000)
    half = 1.96 * values.std() / 400**0.5
    assert low == pytest.approx(values.mean() - half, abs=0.03)
    assert high == pytest.approx(values.mean() + half, abs=0.03)


def test_rows_count_by_their_tokens():
    found = PerRow(np.array([1.0, 4.0]), np.array([30.0, 10.0]))
    assert found.mean == pytest.approx((30 * 1 + 10 * 4) / 40)
    assert found.minus(PerRow(np.array([1.0, 1.0]), found.tokens)).mean == pytest.approx(0.75)
    assert found.columns("kl").keys() == {"kl", "kl_low", "kl_high"}


def test_rows_of_padding_change_nothing():
    own = PerRow(np.array([1.0, 2.0, 5.0]), np.array([3.0, 4.0, 2.0]))
    padded = PerRow(np.array([1.0, 2.0, 5.0, 0.0]), np.array([3.0, 4.0, 2.0, 0.0]))
    assert padded.mean == own.mean
    assert math.isnan(PerRow(np.zeros(1), np.zeros(1)).mean)


def test_one_row_has_no_interval():
    assert all(math.isnan(v) for v in PerRow(np.array([2.0]), np.array([5.0])).interval())


def test_the_interval_of_the_largest_chooses_it_anew():
    """Of two figures on the same rows; where one is larger in every row, it is that one's interval."""
    rng, tokens = np.random.default_rng(1), np.ones(30)
    small, large = PerRow(rng.normal(size=30), tokens), PerRow(rng.normal(size=30), tokens)
    above = PerRow(small.values + 2, tokens)
    assert interval_of_largest([small, above], seed=3) == above.interval(seed=3)
    means = np.maximum(small.resampled(seed=3), large.resampled(seed=3))
    low, high = interval_of_largest([small, large], seed=3)
    assert (low, high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))
    assert low >= max(small.interval(seed=3)[0], large.interval(seed=3)[0])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=20), st.integers(0, 3))
def test_the_interval_lies_among_the_values_and_is_seeded(values: list[float], seed: int):
    rows = PerRow(np.array(values), np.ones(len(values)))
    low, high = rows.interval(seed=seed, resamples=100)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    assert (low, high) == rows.interval(seed=seed, resamples=100)
