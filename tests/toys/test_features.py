"""Sparse features: what they are, and that a step's batch follows from seed and step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_vpd.toys.features import SparseFeatures
from tl_vpd.training.data import Batches


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 5), st.floats(0, 1), st.integers(0, 99))
def test_shapes_ranges_and_repetition(n, rows, context, probability, step):
    data = SparseFeatures(n, probability, rows, context, low=-1.0, high=2.0, seed=3)
    x = data.at(step)
    assert isinstance(data, Batches)
    assert x.shape == (rows, context, n) and bool(((x >= -1) & (x < 2)).all())
    data.at(step + 7)
    assert torch.equal(x, data.at(step))


def test_features_are_on_as_often_as_said_and_uniform_where_they_are():
    x = SparseFeatures(10, 0.05, batch_size=200, context=100, seed=1).at(0)
    on = x[x != 0]
    assert float((x != 0).float().mean()) == pytest.approx(0.05, abs=0.002)
    assert float(on.mean()) == pytest.approx(0.5, abs=0.01) and float(on.var()) == pytest.approx(1 / 12, abs=0.005)
    together = ((x[..., 0] != 0) & (x[..., 1] != 0)).float().mean()
    assert float(together) == pytest.approx(0.0025, abs=0.001)


def test_steps_and_seeds_give_other_batches():
    batches = [SparseFeatures(5, 0.5, 4, 8, seed=seed).at(step) for seed in (0, 1) for step in (0, 1)]
    assert all(not torch.equal(a, b) for i, a in enumerate(batches) for b in batches[:i])
