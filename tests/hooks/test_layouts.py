"""Flags that change how a product is carried out change nothing else: values, shapes, patches, gradients."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.tiny import decomposition_of, draw, edited, options_of, some_tokens
from tl_vpd.forward import MaskedModel
from tl_vpd.masking import Masks, SiteMask

from .flagged import LAYOUTS, flagged, set_flags
from .test_edited import as_masks, by_token, constant
from .test_exact import ones

pytestmark = pytest.mark.parametrize("name", LAYOUTS)


@pytest.fixture
def case(name):
    """The model with its flags off, the flags, a decomposition in its dtype, tokens."""
    model, flags = flagged(name)
    return model, flags, decomposition_of(model).double(), some_tokens()


def test_ones_change_no_bit(case):
    model, flags, vpd, tokens = case
    set_flags(model, flags)
    clean, plain_cache = model.run_with_cache(tokens)
    with vpd.attach(model) as attached:
        assert torch.equal(model(tokens), clean)
        logits, cache = model.run_with_cache(tokens)
        assert torch.equal(logits, clean) and all(torch.equal(cache[k], plain_cache[k]) for k in plain_cache)
        assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=vpd.mask_hooks(ones(vpd))), clean)
        for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with context(), attached.masked("unmasked", delta=1.0):
                assert torch.equal(model(tokens.clone()), clean)
    with MaskedModel(vpd, model) as masked_model:
        assert torch.equal(masked_model.masked(tokens, ones(vpd)), clean)


def test_constant_masks_are_the_edited_model(case):
    model, flags, vpd, tokens = case
    masks = constant(vpd)
    expected = edited(model, vpd, masks)(tokens)
    set_flags(model, flags)
    assert_close(edited(model, vpd, masks)(tokens), expected, rtol=1e-10, atol=1e-10)
    with vpd.attach(model) as attached:
        with attached.masked(as_masks(masks)):
            assert_close(model(tokens), expected, rtol=1e-10, atol=1e-10)
        hooks = vpd.mask_hooks(as_masks(masks))
        assert_close(model.run_with_hooks(tokens, fwd_hooks=hooks), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("routed", [False, True])
def test_masks_for_every_token_are_those_with_the_flags_off(case, routed):
    model, flags, vpd, tokens = case
    masks = by_token(vpd, routed)
    with torch.no_grad(), vpd.attach(model) as attached, attached.masked(masks):
        expected = model(tokens)
        set_flags(model, flags)  # while attached
        assert_close(model(tokens), expected, rtol=1e-10, atol=1e-10)
        with MaskedModel(vpd, model) as masked_model:
            assert_close(masked_model.masked(tokens, masks), expected, rtol=1e-10, atol=1e-10)
        set_flags(model, flags, on=False)
        assert torch.equal(model(tokens), expected)


def test_every_mode_is_the_one_with_the_flags_off(case):
    model, flags, vpd, tokens = case

    def run(mode):
        with torch.no_grad(), vpd.attach(model) as attached, attached.masked(mode, **options_of(mode, seed=3, steps=2)):
            return model(tokens)

    modes = ("stochastic", "rounded", "ci", "adversarial", "zero")
    expected = {mode: run(mode) for mode in modes}
    set_flags(model, flags)
    for mode in modes:
        assert_close(run(mode), expected[mode], rtol=1e-9, atol=1e-9, msg=mode)


def test_what_the_cache_shows_has_no_head_axis_and_the_same_values(case):
    model, flags, vpd, tokens = case
    with torch.no_grad(), vpd.attach(model):
        _, off = model.run_with_cache(tokens)
        set_flags(model, flags)
        _, on = model.run_with_cache(tokens)
    for site in vpd.sites.values():
        for kind, shape in (
            ("component_acts", (2, 7, 6)),
            ("ci", (2, 7, 6)),
            ("mask", (2, 7, 6)),
            ("delta_mask", (2, 7, 1)),
        ):
            hook = site.hook_name(kind)
            assert on[hook].shape == shape, hook
            assert_close(on[hook], off[hook], rtol=1e-10, atol=1e-10, msg=hook)
    result = vpd.causal_importances(model, tokens)
    acts = vpd.component_acts(model, tokens)
    for n, site in vpd.sites.items():
        assert_close(result[n], off[site.hook_name("ci")], rtol=1e-10, atol=1e-10)
        assert_close(acts[n], off[site.hook_name("component_acts")], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("how", ["in place", "returned"])
def test_patched_activations_have_the_effect_they_have_with_the_flags_off(case, how):
    model, flags, vpd, tokens = case
    donor = draw(2, 7, 6, seed=8)

    def patch(acts, hook):
        if how == "returned":
            return torch.cat([acts[:, :3], donor[:, 3:5], acts[:, 5:]], dim=1)
        acts[:, 3:5] = donor[:, 3:5]
        return None

    def results():
        measured = {}
        for n in ("blocks.0.attn.W_Q", "blocks.0.attn.W_K", "blocks.0.attn.W_V", "blocks.1.attn.W_O"):
            hooks = [(vpd.sites[n].hook_name("component_acts"), patch)]
            measured[n] = model.run_with_hooks(tokens, fwd_hooks=hooks)
            with attached.masked(masks):
                measured[n, "masked"] = model.run_with_hooks(tokens, fwd_hooks=hooks)
        return measured

    masks = by_token(vpd)
    with torch.no_grad(), vpd.attach(model) as attached:
        clean, expected = model(tokens), results()
        set_flags(model, flags)
        for key, got in results().items():
            assert_close(got, expected[key], rtol=1e-9, atol=1e-10, msg=str(key))
            assert bool(((got - clean).abs() > 1e-6).any())


def test_gradients_of_v_u_masks_and_activations_are_those_with_the_flags_off(case):
    model, flags, vpd, tokens = case
    weights = draw(2, 7, 11, seed=4)
    masks = by_token(vpd)
    for site_mask in masks.values():
        site_mask.mask.requires_grad_()
        site_mask.delta.requires_grad_()
    leaves = [t for n in vpd.sites for t in (vpd.V[n], vpd.U[n], masks[n].mask, masks[n].delta)]
    names = [s.hook_name("component_acts") for s in vpd.sites.values()]

    def gradients():
        recorded = {}
        look = [(n, lambda t, hook: recorded.update({hook.name: t})) for n in names]
        logits = model.run_with_hooks(tokens, fwd_hooks=look)
        return torch.autograd.grad((logits * weights).sum(), [*leaves, *(recorded[n] for n in names)])

    with vpd.attach(model) as attached, attached.masked(masks):
        expected = gradients()
        set_flags(model, flags)
        got = gradients()
    assert all(p.grad is None for p in model.parameters())
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, rtol=1e-8, atol=1e-10)
        assert bool((a != 0).any())


@pytest.mark.parametrize("values", [None, "means"])
def test_ablations_of_few_subcomponents_are_those_with_the_flags_off(case, values):
    model, flags, vpd, tokens = case
    addresses = [f"{n}:{i}" for n in vpd.sites for i in (1, 4)]
    means = None if values is None else vpd.component_acts(model, tokens).mean(by_position=True)
    with torch.no_grad(), vpd.attach(model) as attached, attached.ablated(addresses, pos=[2, 5], values=means):
        expected = model(tokens)
        set_flags(model, flags)
        assert_close(model(tokens), expected, rtol=1e-9, atol=1e-10)


def test_one_site_at_a_time(case):
    """A mistake in one site's layout cannot hide behind another's."""
    model, flags, vpd, tokens = case
    set_flags(model, flags)
    for n, c in vpd.counts.items():
        m, d = draw(c, seed=2), torch.tensor(0.3, dtype=torch.float64)
        expected = edited(model, vpd, {n: (m, float(d))})(tokens)
        masks = Masks({n: SiteMask(m, d)})
        with torch.no_grad(), vpd.attach(model, sites=n) as attached, attached.masked(masks):
            assert_close(model(tokens), expected, rtol=1e-10, atol=1e-10, msg=n)
