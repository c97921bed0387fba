"""Uniform-k routing: how many sites a token takes, and which."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_vpd.masking.routing import uniform_k, uniform_k_share


def routing(n: int, shape: tuple[int, int], seed: int) -> torch.Tensor:
    """Bool [site, batch, pos]."""
    return uniform_k(n, shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 5), st.integers(0, 1000))
def test_every_token_takes_between_one_and_all_sites(n, batch, pos, seed):
    where = routing(n, (batch, pos), seed)
    counts = where.sum(0)
    assert where.shape == (n, batch, pos) and bool(((counts >= 1) & (counts <= n)).all())
    assert torch.equal(where, routing(n, (batch, pos), seed))


def test_k_is_uniform_and_no_site_is_preferred():
    n, tokens = 4, 40_000
    where = routing(n, (200, 200), 0)
    sizes = where.sum(0).flatten().bincount(minlength=n + 1)[1:] / tokens
    assert bool((sizes - 1 / n).abs().max() < 0.01)  # three standard deviations are 0.0065
    expected = uniform_k_share(n)  # the mean of k / n
    assert expected == 5 / 8
    assert bool((where.float().mean((1, 2)) - expected).abs().max() < 0.01)
    pairs = (where[0] & where[1]).float().mean()  # E[k (k − 1)] / (n (n − 1)) = 5 / 12
    assert abs(float(pairs) - 5 / 12) < 0.01
