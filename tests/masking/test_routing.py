"""Uniform-k routing: how many sites a token takes, and which (VPD paper, section on losses)."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_vpd.masking.routing import Routing, count, joined, uniform_k, uniform_k_share


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


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.integers(0, 1000))
def test_tokens_of_a_routing_are_those_that_are_routed(rows, pos, n, seed):
    names = [f"site {i}" for i in range(n)]
    every = Routing(names, routing(n, (rows, pos), seed).transpose(0, 1))
    for part in (every, every.rows(slice(1, None)), every.rows(slice(0, 0))):
        assert list(part) == names and part.counts_of(names) == [len(part.tokens[name]) for name in names]
        for name in names:
            assert torch.equal(part.tokens[name], part[name].flatten().nonzero().squeeze(1))


def test_routings_are_counted_together_with_other_numbers():
    one, other = (Routing(["a", "b"], routing(2, (3, 4), seed).transpose(0, 1)) for seed in (1, 2))
    assert count([one, other], [torch.tensor([5.0, 6.0])]) == [[5.0, 6.0]]
    for r in (one, other):
        assert r.counts.tolist() == r.routed.sum(-1).tolist()
    assert count([one]) == []


def test_attacked_rows_come_before_the_others_and_none_stands_for_everywhere():
    stochastic = Routing(["a", "b"], routing(2, (3, 4), 0).transpose(0, 1))
    both = joined(None, stochastic, 2, 3)
    assert both is not None and both.counts[:2].tolist() == [[4, 4], [4, 4]] and both.routed[:2].all()
    assert torch.equal(both.routed[2:], stochastic.routed) and both.counts[2:].tolist() == stochastic.counts.tolist()
    assert joined(None, None, 2, 3) is None
