"""The cheapest one-to-one assignment."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tl_vpd.evaluation.assignment import assign


@st.composite
def costs(draw):
    n = draw(st.integers(1, 5))
    m = draw(st.integers(n, 6))
    return draw(arrays(np.float64, (n, m), elements=st.floats(-5, 5, width=16)))


@settings(deadline=None, max_examples=150)
@given(costs())
def test_no_other_assignment_is_cheaper(cost):
    n, m = cost.shape
    found = assign(cost)
    assert len(set(found.tolist())) == n
    own = cost[np.arange(n), found].sum()
    assert own <= min(sum(cost[i, j] for i, j in enumerate(p)) for p in itertools.permutations(range(m), n)) + 1e-9


def test_a_hidden_permutation_is_found_in_a_large_matrix():
    order = np.random.default_rng(0).permutation(60)
    cost = np.random.default_rng(1).uniform(0.5, 1, (60, 60))
    cost[np.arange(60), order] = 0
    assert (assign(cost) == order).all()


def test_what_cannot_be_assigned_is_said():
    with pytest.raises(ValueError, match="3 rows and 2 columns: hand in the transpose"):
        assign(np.zeros((3, 2)))
    with pytest.raises(ValueError, match="not finite"):
        assign(np.array([[np.nan, 1.0]]))
