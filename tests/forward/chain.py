"""A chain of three sites with random everything in float64, for tests of the masked product."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.tiny import draw
from tl_vpd.forward import PassMasks
from tl_vpd.masking.routing import Routing
from tl_vpd.site import ConcatenatedAxis

AXIS = ConcatenatedAxis({"a": 5, "b": 3, "c": 4})
SHAPES = {"a": (4, 6), "b": (6, 2), "c": (2, 4)}
BATCH, POS = 2, 7
TOKENS = BATCH * POS
POOL = 3
"""Rows of the sources that tokens share."""


def leaves(pooled: bool, bias: bool, seed: int) -> dict[str, Tensor]:
    """A chain of three sites with random everything."""
    tensors = {
        "x": draw(BATCH, POS, 4, seed=seed) - 0.5,
        "g": draw(BATCH, POS, AXIS.total, seed=seed + 1),
        "sources": draw(POOL if pooled else TOKENS, AXIS.total + 3, seed=seed + 2),
    }
    for i, (name, (d_in, d_out)) in enumerate(SHAPES.items()):
        C = AXIS.counts[name]
        tensors[f"W{name}"] = draw(d_in, d_out, seed=seed + 10 + i) - 0.5
        tensors[f"V{name}"] = draw(d_in, C, seed=seed + 20 + i) - 0.5
        tensors[f"U{name}"] = draw(C, d_out, seed=seed + 30 + i) - 0.5
        if bias:
            tensors[f"b{name}"] = draw(d_out, seed=seed + 40 + i)
    return {name: t.requires_grad_(name[0] != "b") for name, t in tensors.items()}


def of_pass(masks: PassMasks, t: dict[str, Tensor]) -> Callable[[str, Tensor, Tensor], Tensor]:
    """A pass's products."""
    assert isinstance(masks, PassMasks)
    return lambda name, y, x: masks.product(name, y, x, t[f"V{name}"], t[f"U{name}"], t.get(f"b{name}"))


def chain(t: dict[str, Tensor], product: Callable[[str, Tensor, Tensor], Tensor]) -> Tensor:
    """A number from three masked products, one after the other."""
    x = t["x"]
    for name in SHAPES:
        x = product(name, x @ t[f"W{name}"] + t.get(f"b{name}", 0), x).tanh()
    return (x * draw(BATCH, POS, 4, seed=50)).sum()


def routing_of(share: float, seed: int) -> Routing:
    """Random routing of every site; at least one token is not routed."""
    routed = torch.stack([draw(BATCH, POS, seed=seed + 60 + i) < share for i in range(len(SHAPES))], dim=1)
    routed[0, :, 0] = False
    return Routing(tuple(SHAPES), routed)
