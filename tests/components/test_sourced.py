"""The training pass's product against the same masks made one by one: values and every gradient."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.tiny import decomposition_of, draw, some_tokens, tiny_model
from tl_vpd.components import SourcedPass, masked_output
from tl_vpd.components import sourced as module
from tl_vpd.hooks import TappedModel
from tl_vpd.masking import masks_from_sources
from tl_vpd.site import Packing

PACKING = Packing({"a": 5, "b": 3, "c": 4})
SHAPES = {"a": (4, 6), "b": (6, 2), "c": (2, 4)}


def leaves(shared: bool, bias: bool):
    """A chain of three sites with random everything, float64."""
    g = draw(2, 7, 12, seed=1)
    sources = draw(*((1, 1) if shared else (2, 7)), 15, seed=2)
    tensors = {"x": draw(2, 7, 4, seed=3) - 0.5, "g": g, "sources": sources}
    for i, (name, (d_in, d_out)) in enumerate(SHAPES.items()):
        C = PACKING.counts[name]
        tensors[f"W{name}"] = draw(d_in, d_out, seed=10 + i) - 0.5
        tensors[f"V{name}"], tensors[f"U{name}"] = (
            draw(d_in, C, seed=20 + i) - 0.5,
            draw(C, d_out, seed=30 + i) - 0.5,
        )
        if bias:
            tensors[f"b{name}"] = draw(d_out, seed=40 + i)
    return {k: t.requires_grad_(k[0] != "b") for k, t in tensors.items()}


def chain(t, site):
    x = t["x"]
    for name in SHAPES:
        y = x @ t[f"W{name}"] + t.get(f"b{name}", 0)
        x = site(name, y, x).tanh()
    return (x * draw(2, 7, 4, seed=50)).sum()


@pytest.mark.parametrize("block", [1 << 17, 8])
@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_values_and_gradients_are_those_of_masks_made_one_by_one(shared, bias, routed, block, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", block)
    routing = {n: draw(2, 7, seed=60 + i) < 0.5 for i, n in enumerate(SHAPES)} if routed else None
    one, other = leaves(shared, bias), leaves(shared, bias)
    run = SourcedPass(one["g"], one["sources"], PACKING, routing)
    value = chain(one, lambda n, y, x: run.product(n, y, x, one[f"V{n}"], one[f"U{n}"], one.get(f"b{n}")))
    masks = masks_from_sources(other["g"], other["sources"], PACKING, routing)

    def plain(n, y, x):
        own = masks[n]
        return masked_output(
            y,
            x @ other[f"V{n}"],
            other[f"U{n}"],
            other.get(f"b{n}"),
            mask=own.mask,
            delta_mask=own.delta,
            routed=own.routed,
        )

    expected = chain(other, plain)
    assert_close(value, expected)
    value.backward()
    expected.backward()
    for name, tensor in one.items():
        if tensor.requires_grad:
            assert_close(tensor.grad, other[name].grad, rtol=1e-9, atol=1e-12, msg=name)


def test_only_what_is_asked_for_gets_gradients():
    t = leaves(shared=False, bias=True)
    for k, tensor in t.items():
        tensor.requires_grad_(k == "sources")
    run = SourcedPass(t["g"], t["sources"], PACKING)
    chain(t, lambda n, y, x: run.product(n, y, x, t[f"V{n}"], t[f"U{n}"], t[f"b{n}"])).backward()
    assert t["sources"].grad is not None and all(t[k].grad is None for k in t if k != "sources")
    with torch.no_grad():
        again = chain(t, lambda n, y, x: run.product(n, y, x, t[f"V{n}"], t[f"U{n}"], t[f"b{n}"]))
    assert not again.requires_grad


def test_a_pass_over_some_sites_leaves_the_others_gradients_at_zero():
    t = leaves(shared=False, bias=False)
    run = SourcedPass(t["g"], t["sources"], PACKING)
    chain(t, lambda n, y, x: run.product(n, y, x, t["Vb"], t["Ub"], None) if n == "b" else y).backward()
    zero = torch.ones(12, dtype=torch.bool)
    zero[5:8] = False
    assert bool((t["g"].grad[..., zero] == 0).all()) and bool((t["g"].grad[..., ~zero] != 0).any())
    assert bool((t["sources"].grad[..., [12, 14]] == 0).all()) and bool((t["sources"].grad[..., 13] != 0).any())


@pytest.mark.parametrize("flag", [None, "use_attn_result", "use_split_qkv_input"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_tapped_model_takes_a_sourced_pass_in_every_layout_and_precision(flag, dtype):
    model, tokens = tiny_model(), some_tokens()
    if flag:
        getattr(model, f"set_{flag}")(True)
    vpd = decomposition_of(model).double()
    g, sources = draw(2, 7, 72, seed=1).to(dtype), draw(2, 7, 84, seed=2).to(dtype)
    with torch.no_grad(), TappedModel(vpd, model) as tapped:
        found = tapped.masked(tokens, SourcedPass(g, sources, vpd.packing))
        expected = tapped.masked(tokens, masks_from_sources(g, sources, vpd.packing))
    assert_close(found, expected, rtol=1e-6 if dtype == torch.float32 else 1e-10, atol=1e-9)
