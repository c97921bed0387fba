"""Routed tokens in slots: which slot each has, and how rows and gradients come back."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import draw
from tl_vpd.forward.slots import Slots, assign_slots


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 12), st.floats(0, 1), st.integers(0, 5), st.integers(0, 1000))
def test_slots_hold_every_routed_token_once(n_sites, tokens, share, spare, seed):
    routing = torch.rand(n_sites, tokens, generator=torch.Generator().manual_seed(seed)) < share
    most = int(routing.sum(1).max())
    n = min(tokens, max(1, most + spare))
    assigned = assign_slots(routing, n)
    assert assigned.token.shape == (n_sites, n)
    for token, slot, routed in zip(*assigned, strict=True):
        assert len(token.unique()) == n  # each token has one slot at most
        at = routed.nonzero().squeeze(1)
        assert torch.equal(token[slot[at]], at)
        rows = draw(tokens, 3, seed=seed)
        slots = Slots(token, slot, routed)
        assert torch.equal(slots.spread(slots.gathered(rows))[routed], rows[routed])
        assert torch.equal(slots.gradient(rows[token]), rows * routed[:, None])
