from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tl_vpd.components import Components
from tl_vpd.components.initialise import start_at_channels
from tl_vpd.site import Site


@pytest.mark.parametrize("name", ["blocks.0.mlp.W_in", "blocks.0.mlp.W_out", "blocks.0.attn.W_Q", "blocks.0.attn.W_O"])
def test_one_subcomponent_a_channel_sums_to_the_weight(name: str):
    reads = name.endswith(("W_O", "W_out"))
    shape = (6, 4) if reads else (4, 6)
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    parts = Components([Site(name, *shape)], {name: 6})
    start_at_channels(parts, name, W)
    assert_close(parts.V[name] @ parts.U[name], W, rtol=0, atol=1e-6)
    # Each subcomponent touches one channel, and its two factors are equally long.
    one = parts.V[name].T if reads else parts.U[name]
    assert ((one != 0).sum(-1) == 1).all()
    assert_close(parts.V[name].norm(dim=0), parts.U[name].norm(dim=-1))


def test_fewer_take_the_largest_channels_and_more_write_next_to_nothing():
    name, W = "blocks.0.mlp.W_in", torch.diag(torch.tensor([1.0, 3.0, 2.0]))
    few = Components([Site(name, 3, 3)], {name: 2})
    start_at_channels(few, name, W)
    assert_close(few.V[name] @ few.U[name], torch.diag(torch.tensor([0.0, 3.0, 2.0])))
    many = Components([Site(name, 3, 3)], {name: 5})
    start_at_channels(many, name, W)
    assert_close(many.V[name] @ many.U[name], W, rtol=0, atol=0.1)
    assert (many.U[name][3:].norm(dim=-1) < 0.05).all()
