"""Routed tokens in slots: where each goes and comes back from, and the product against the masks written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from tests.tiny import draw
from tl_vpd.forward.traceable import Slots, TraceableMasks, slots


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 12), st.floats(0, 1), st.integers(0, 5), st.integers(0, 1000))
def test_slots_hold_every_routed_token_once(n_sites, tokens, share, spare, seed):
    routing = torch.rand(n_sites, tokens, generator=torch.Generator().manual_seed(seed)) < share
    most = int(routing.sum(1).max())
    n = min(tokens, max(1, most + spare))
    found = slots(routing, n)
    assert found is not None and found.token.shape == (n_sites, n)
    for token, slot, routed in zip(*found, strict=True):
        assert len(token.unique()) == n  # each token has one slot at the most
        at = routed.nonzero().squeeze(1)
        assert torch.equal(token[slot[at]], at)
        rows = draw(tokens, 3, seed=seed)
        one = Slots(token, slot, routed)
        assert torch.equal(one.spread(one.gathered(rows))[routed], rows[routed])
        assert torch.equal(one.gradient(rows[token]), rows * routed[:, None])
    if most:
        assert slots(routing, most - 1) is None


@pytest.mark.parametrize("bias", [None, "bias"])
def test_a_routed_product_is_the_masked_one_where_routed_and_the_models_own_elsewhere(bias):
    tokens, d_in, d_out, C = 12, 4, 3, 5
    generator = torch.Generator().manual_seed(0)
    routed = torch.rand(tokens, generator=generator) < 0.5
    given = {"y": (tokens, d_out), "x": (tokens, d_in), "V": (d_in, C), "U": (C, d_out), "g": (tokens, C)}
    given |= {"r": (tokens, C), "delta": (tokens, 1)}
    leaves = {name: draw(*shape, seed=i).requires_grad_() for i, (name, shape) in enumerate(given.items())}
    b = None if bias is None else draw(d_out, seed=9)

    mask = leaves["g"] + (1 - leaves["g"]) * leaves["r"]
    zero = torch.zeros(d_out, dtype=torch.float64) if b is None else b
    masked = zero + leaves["delta"] * (leaves["y"] - zero)
    masked = masked + (leaves["x"] @ leaves["V"] * (mask - leaves["delta"])) @ leaves["U"]
    expected = torch.where(routed[:, None], masked, leaves["y"])

    stacked = slots(routed[None], int(routed.sum()) + 2)
    assert stacked is not None
    at = Slots(*(tensor[0] for tensor in stacked))
    held = {name: {"site": at.gathered(leaves[name])} for name in ("g", "r", "delta")}
    run = TraceableMasks(held["g"], held["r"], held["delta"], torch.Size([3, 4]), {"site": at})
    y, x = leaves["y"].view(3, 4, d_out), leaves["x"].view(3, 4, d_in)
    output = run.product("site", y, x, leaves["V"], leaves["U"], b).view(tokens, d_out)
    assert_close(output, expected, rtol=1e-12, atol=1e-12)

    weights = draw(tokens, d_out, seed=10) - 0.5
    own = torch.autograd.grad((output * weights).sum(), list(leaves.values()))
    true = torch.autograd.grad((expected * weights).sum(), list(leaves.values()))
    for name, a, e in zip(leaves, own, true, strict=True):
        assert_close(a, e, rtol=1e-10, atol=1e-12, msg=name)

    spread, of_delta = run.mask("site")
    assert spread.shape == (3, 4, C) and run.routing is not None
    assert_close(spread[run.routing["site"]], mask.view(3, 4, C)[run.routing["site"]])
    assert_close(of_delta[run.routing["site"]], leaves["delta"].view(3, 4)[run.routing["site"]])
