"""The training pass's product against the same masks made one by one: values and every gradient."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.tiny import decomposition_of, draw, some_tokens, tiny_model
from tl_vpd.baselines import SlopedSquash
from tl_vpd.forward import BlockedMasks, MaskedModel, masked_output
from tl_vpd.forward import blocked as module
from tl_vpd.importance.squash import LOWER_LEAKY
from tl_vpd.masking import masks_from_sources
from tl_vpd.site import ConcatenatedAxis

PACKING = ConcatenatedAxis({"a": 5, "b": 3, "c": 4})
SHAPES = {"a": (4, 6), "b": (6, 2), "c": (2, 4)}


def leaves(shared: bool, bias: bool):
    """A chain of three sites with random everything, float64."""
    g = draw(2, 7, 12, seed=1)
    sources = draw(3 if shared else 14, 15, seed=2)
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


TAKEN = torch.tensor([0, 2, 1, 1, 0, 2, 2, 0, 0, 1, 2, 1, 0, 0])
"""Which of three shared sources each token takes."""


def pass_of(t, routing=None, shared=False, some=None, squash=None):
    """A pass that leaves the gradients of g and of the sources (or the first ``some``) where the leaves have theirs."""
    t["g"].grad, t["sources"].grad = torch.zeros_like(t["g"]), torch.zeros_like(t["sources"])
    grad_sources = t["sources"].grad[:some]
    return BlockedMasks(
        t["g"],
        t["sources"],
        PACKING,
        routing,
        taken=TAKEN if shared else None,
        grad_g=t["g"].grad,
        grad_sources=grad_sources,
        squash=squash,
    )


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
    run = pass_of(one, routing, shared)
    value = chain(one, lambda n, y, x: run.product(n, y, x, one[f"V{n}"], one[f"U{n}"], one.get(f"b{n}")))
    spread = other["sources"][TAKEN] if shared else other["sources"]
    masks = masks_from_sources(other["g"], spread.view(2, 7, 15), PACKING, routing)

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


@pytest.mark.parametrize("squash", [LOWER_LEAKY, SlopedSquash(0.1)])
@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_importances_made_in_the_product_are_those_made_before(shared, routed, squash, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 8)
    routing = {n: draw(2, 7, seed=60 + i) < 0.5 for i, n in enumerate(SHAPES)} if routed else None
    z = 3 * draw(2, 7, PACKING.total, seed=70) - 1
    found = []
    for g, made in ((squash.importances(z), None), (z, squash)):
        t = {**leaves(shared, bias=False), "g": g}
        run = pass_of(t, routing, shared, squash=made)
        chain(t, lambda n, y, x, t=t, run=run: run.product(n, y, x, t[f"V{n}"], t[f"U{n}"], None)).backward()
        found.append([*(own.grad for own in t.values() if own.grad is not None), run.mask("a")[0]])
    for given, made in zip(*found, strict=True):
        assert_close(made, given)


def test_only_what_is_asked_for_gets_gradients():
    t = leaves(shared=False, bias=True)
    for tensor in t.values():
        tensor.requires_grad_(False)
    found = torch.zeros_like(t["sources"])
    run = BlockedMasks(t["g"], t["sources"], PACKING, grad_sources=found)
    value = chain(t, lambda n, y, x: run.product(n, y, x, t[f"V{n}"], t[f"U{n}"], t[f"b{n}"]))
    assert torch.autograd.grad(value, run.handle, allow_unused=True) == (None,)
    assert bool((found != 0).any()) and all(tensor.grad is None for tensor in t.values())
    run = BlockedMasks(t["g"], t["sources"], PACKING)
    assert not chain(t, lambda n, y, x: run.product(n, y, x, t[f"V{n}"], t[f"U{n}"], t[f"b{n}"])).requires_grad


def test_importances_gradients_add_up_over_passes():
    t = leaves(shared=False, bias=False)
    run = pass_of(t)
    site = lambda n, y, x: run.product(n, y, x, t[f"V{n}"], t[f"U{n}"], None)  # noqa: E731
    chain(t, site).backward()
    once = t["g"].grad.clone()
    run = BlockedMasks(t["g"], t["sources"], PACKING, grad_g=t["g"].grad)
    chain(t, site).backward()
    assert_close(t["g"].grad, 2 * once)


@pytest.mark.parametrize("routed", [False, True])
def test_only_the_first_sources_may_want_gradients(routed):
    """Tokens that take later ones leave nothing, as in a pass with attacked and stochastic rows."""
    routing = {n: draw(2, 7, seed=60 + i) < 0.5 for i, n in enumerate(SHAPES)} if routed else None
    whole, part = leaves(shared=True, bias=False), leaves(shared=True, bias=False)
    for t, some in ((whole, None), (part, 2)):
        run = pass_of(t, routing, shared=True, some=some)
        chain(t, lambda n, y, x, t=t, run=run: run.product(n, y, x, t[f"V{n}"], t[f"U{n}"], None)).backward()
    assert_close(part["sources"].grad[:2], whole["sources"].grad[:2])
    assert bool((part["sources"].grad[2] == 0).all()) and bool((whole["sources"].grad[2] != 0).any())
    assert_close(part["g"].grad, whole["g"].grad)


def test_a_pass_over_some_sites_leaves_the_others_gradients_at_zero():
    t = leaves(shared=False, bias=False)
    run = pass_of(t)
    chain(t, lambda n, y, x: run.product(n, y, x, t["Vb"], t["Ub"], None) if n == "b" else y).backward()
    zero = torch.ones(12, dtype=torch.bool)
    zero[5:8] = False
    assert bool((t["g"].grad[..., zero] == 0).all()) and bool((t["g"].grad[..., ~zero] != 0).any())
    assert bool((t["sources"].grad[..., [12, 14]] == 0).all()) and bool((t["sources"].grad[..., 13] != 0).any())


def test_gradients_reach_importances_and_sources_through_masks_as_tensors():
    """Where a flag splits a product by head, masks are made as tensors; their gradients must be the same."""
    model, tokens = tiny_model(), some_tokens()
    vpd = decomposition_of(model).double()
    vpd.requires_grad_(False)
    g, sources = draw(2, 7, 72, seed=1), draw(14, 84, seed=2)
    found = []
    for split in (False, True):
        model.set_use_split_qkv_input(split)
        of_g, of_sources = torch.zeros_like(g), torch.zeros_like(sources)
        with MaskedModel(vpd, model) as masked_model:
            run = BlockedMasks(g, sources, vpd.site_axis, grad_g=of_g, grad_sources=of_sources)
            value = masked_model.masked(tokens, run).square().sum()
            torch.autograd.grad(value, run.handle, allow_unused=True)
        found.append((of_g, of_sources))
    assert_close(found[0], found[1], rtol=1e-8, atol=1e-10)
    assert bool((found[0][0] != 0).any()) and bool((found[0][1] != 0).any())


@pytest.mark.parametrize("flag", [None, "use_attn_result", "use_split_qkv_input"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_tapped_model_takes_a_sourced_pass_in_every_layout_and_precision(flag, dtype):
    model, tokens = tiny_model(), some_tokens()
    if flag:
        getattr(model, f"set_{flag}")(True)
    vpd = decomposition_of(model).double()
    g, sources = draw(2, 7, 72, seed=1).to(dtype), draw(14, 84, seed=2).to(dtype)
    with torch.no_grad(), MaskedModel(vpd, model) as masked_model:
        found = masked_model.masked(tokens, BlockedMasks(g, sources, vpd.site_axis))
        expected = masked_model.masked(tokens, masks_from_sources(g, sources.view(2, 7, 84), vpd.site_axis))
    assert_close(
        found, expected, rtol=1e-5 if dtype == torch.float32 else 1e-10, atol=1e-6 if dtype == torch.float32 else 1e-10
    )
