"""Passes with masks made block by block: which gradients there are, importances made in the product, whole models."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.forward.chain import AXIS, BATCH, POOL, POS, TOKENS, chain, leaves, of_pass, routing_of
from tests.tiny import decomposition_of, draw, some_tokens, tiny_model
from tl_vpd.baselines import SlopedSquash
from tl_vpd.forward import BlockedMasks, MaskedModel, MaskInputs, TraceableMasks
from tl_vpd.forward import blocked as module
from tl_vpd.importance.squash import LOWER_LEAKY
from tl_vpd.masking import masks_from_sources

SOURCE_ROWS = (draw(TOKENS, seed=70) * POOL).long()
"""Which of three pooled sources each token uses."""


def pass_of(t, routing=None, pooled=False, squash=None, source_rows=SOURCE_ROWS, first=None, attacked=None):
    """A pass that leaves the gradients of g and of the sources (or the first of them) where those of the leaves are."""
    t["g"].grad, t["sources"].grad = torch.zeros_like(t["g"]), torch.zeros_like(t["sources"])
    return BlockedMasks(
        t["g"],
        MaskInputs(t["sources"], source_rows if pooled else None, routing, attacked),
        AXIS,
        grad_g=t["g"].grad,
        grad_sources=t["sources"].grad[:first],
        squash=squash,
    )


@pytest.mark.parametrize("squash", [LOWER_LEAKY, SlopedSquash(0.1)])
@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
def test_importances_made_in_the_product_are_those_made_before(pooled, routed, squash, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 8)
    routing = routing_of(0.5, seed=0) if routed else None
    z = 3 * draw(BATCH, POS, AXIS.total, seed=70) - 1
    results = []
    for values, inside in ((squash.importances(z), None), (z, squash)):
        t = {**leaves(pooled, bias=False, seed=0), "g": values}
        masks = pass_of(t, routing, pooled, squash=inside)
        chain(t, of_pass(masks, t)).backward()
        results.append([*(tensor.grad for tensor in t.values() if tensor.grad is not None), masks.mask("a")[0]])
    assert_close(results[1], results[0])


def test_only_what_is_asked_for_gets_gradients():
    t = {name: tensor.detach() for name, tensor in leaves(pooled=False, bias=True, seed=0).items()}
    grad_sources = torch.zeros_like(t["sources"])
    masks = BlockedMasks(t["g"], MaskInputs(t["sources"]), AXIS, grad_sources=grad_sources)
    value = chain(t, of_pass(masks, t))
    assert torch.autograd.grad(value, masks.handle, allow_unused=True) == (None,)
    assert bool((grad_sources != 0).any()) and all(tensor.grad is None for tensor in t.values())
    assert not chain(t, of_pass(BlockedMasks(t["g"], MaskInputs(t["sources"]), AXIS), t)).requires_grad


def test_gradients_of_importances_add_up_over_passes():
    t = leaves(pooled=False, bias=False, seed=0)
    chain(t, of_pass(pass_of(t), t)).backward()
    once = t["g"].grad.clone()
    chain(t, of_pass(BlockedMasks(t["g"], MaskInputs(t["sources"]), AXIS, grad_g=t["g"].grad), t)).backward()
    assert_close(t["g"].grad, 2 * once)


@pytest.mark.parametrize("block", [8, 1 << 16])
@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
def test_gradients_of_the_attacked_rows_sources_alone(pooled, routed, block, monkeypatch):
    """Tokens of later rows, which use later sources, add nothing, as in a pass with attacked and stochastic rows."""
    monkeypatch.setattr(module, "BLOCK", block)
    routing = routing_of(0.5, seed=0) if routed else None
    n = 2 if pooled else POS  # the first row uses two of the pool's sources, the second the third
    source_rows = torch.cat([SOURCE_ROWS[:POS] % 2, torch.full((TOKENS - POS,), 2)])
    every, first = (leaves(pooled, bias=False, seed=0) for _ in range(2))
    for t, options in ((every, {}), (first, {"first": n, "attacked": 1})):
        chain(t, of_pass(pass_of(t, routing, pooled, source_rows=source_rows, **options), t)).backward()
    assert_close(first["sources"].grad[:n], every["sources"].grad[:n])
    assert bool((first["sources"].grad[n:] == 0).all()) and bool((every["sources"].grad[n:] != 0).any())
    assert_close(first["g"].grad, every["g"].grad)


def test_a_pass_over_one_site_leaves_the_gradients_of_the_others_at_zero():
    t = leaves(pooled=False, bias=False, seed=0)
    product = of_pass(pass_of(t), t)
    chain(t, lambda name, y, x: product(name, y, x) if name == "b" else y).backward()
    zero = torch.ones(AXIS.total, dtype=torch.bool)
    zero[AXIS.slices["b"]] = False
    assert bool((t["g"].grad[..., zero] == 0).all()) and bool((t["g"].grad[..., ~zero] != 0).any())
    assert bool((t["sources"].grad[..., [12, 14]] == 0).all()) and bool((t["sources"].grad[..., 13] != 0).any())


def test_gradients_reach_importances_and_sources_through_whole_masks():
    """Where a flag splits a product by head, whole masks are made; their gradients must be the same."""
    model, tokens = tiny_model(), some_tokens()
    vpd = decomposition_of(model).double()
    vpd.requires_grad_(False)
    g, sources = draw(2, 7, 72, seed=1), draw(14, 84, seed=2)
    results = []
    for split in (False, True):
        model.set_use_split_qkv_input(split)
        grad_g, grad_sources = torch.zeros_like(g), torch.zeros_like(sources)
        with MaskedModel(vpd, model) as masked_model:
            masks = BlockedMasks(g, MaskInputs(sources), vpd.site_axis, grad_g=grad_g, grad_sources=grad_sources)
            value = masked_model.masked(tokens, masks).square().sum()
            torch.autograd.grad(value, masks.handle, allow_unused=True)
        results.append((grad_g, grad_sources))
    assert_close(results[0], results[1], rtol=1e-8, atol=1e-10)
    assert bool((results[0][0] != 0).any()) and bool((results[0][1] != 0).any())


@pytest.mark.parametrize("flag", [None, "use_attn_result", "use_split_qkv_input"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_masked_model_computes_both_forms_in_every_layout_and_precision(flag, dtype):
    model, tokens = tiny_model(), some_tokens()
    if flag:
        getattr(model, f"set_{flag}")(True)
    vpd = decomposition_of(model).double()
    g, sources = draw(2, 7, 72, seed=1).to(dtype), draw(2, 7, 84, seed=2).to(dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    with torch.no_grad(), MaskedModel(vpd, model) as masked_model:
        expected = masked_model.masked(tokens, masks_from_sources(g, sources, vpd.site_axis))
        for masks in (
            BlockedMasks(g, MaskInputs(sources.flatten(0, 1)), vpd.site_axis),
            TraceableMasks.from_sources(g, sources, vpd.site_axis),
        ):
            assert_close(masked_model.masked(tokens, masks), expected, **tolerance)
