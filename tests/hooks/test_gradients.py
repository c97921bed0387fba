"""Gradients through an attached model: of cached activations, of V and U, under hooks on the way back."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.tiny import options_of

IN, OUT = "blocks.1.mlp.W_in", "blocks.1.mlp.W_out"


def cached(model, tokens, *names):
    """The logits and the very tensors at hook points (``run_with_cache`` detaches its copies)."""
    recorded = {}
    logits = model.run_with_hooks(
        tokens, fwd_hooks=[(n, lambda t, hook: recorded.update({hook.name: t})) for n in names]
    )
    return logits, recorded


def test_a_cached_activation_has_the_gradient_that_u_projects(model, vpd, tokens):
    weights = torch.randn(2, 7, 11, dtype=torch.float64)
    with vpd.attach(model):
        logits, recorded = cached(model, tokens, "blocks.1.hook_out_component_acts", "blocks.1.hook_mlp_out")
        loss = (logits * weights).sum()
        by_acts, by_output = torch.autograd.grad(loss, list(recorded.values()))
    assert_close(by_acts, by_output @ vpd.U[OUT].detach().T, rtol=1e-10, atol=1e-12)
    assert bool((by_acts != 0).any())


def test_that_gradient_is_the_one_of_finite_differences(model, vpd, tokens):
    name, step = "blocks.0.hook_v_component_acts", 1e-5

    def nudged(amount):
        def nudge(acts, hook):
            acts[1, 2, 3] += amount

        with torch.no_grad():
            return model.run_with_hooks(tokens, fwd_hooks=[(name, nudge)]).square().sum()

    with vpd.attach(model):
        logits, recorded = cached(model, tokens, name)
        (gradient,) = torch.autograd.grad(logits.square().sum(), recorded[name])
        assert_close(gradient[1, 2, 3], (nudged(step) - nudged(-step)) / (2 * step), rtol=1e-6, atol=1e-8)


def test_masked_activations_have_the_gradient_through_their_mask(model, vpd, tokens):
    with vpd.attach(model) as attached, attached.masked("ci", delta=0.5, sites=OUT):
        names = ("blocks.1.hook_out_component_acts", "blocks.1.hook_mlp_out", "blocks.1.hook_out_mask")
        logits, recorded = cached(model, tokens, *names)
        by_acts, by_output = torch.autograd.grad(logits.sum(), [recorded[n] for n in names[:2]])
        assert_close(by_acts, (by_output @ vpd.U[OUT].detach().T) * recorded[names[2]], rtol=1e-10, atol=1e-12)


def test_a_frozen_model_gives_gradients_to_activations_that_a_hook_asks_for(model, vpd, tokens):
    model.requires_grad_(False)
    vpd.requires_grad_(False)
    name, asked = "blocks.1.hook_in_component_acts", []

    def ask(acts, hook):
        asked.append(acts.requires_grad_())

    with vpd.attach(model):
        logits = model.run_with_hooks(tokens, fwd_hooks=[(name, ask)])
        (gradient,) = torch.autograd.grad(logits.sum(), asked)
    model.requires_grad_(True)
    with vpd.attach(model):
        logits, recorded = cached(model, tokens, name)
        assert_close(gradient, torch.autograd.grad(logits.sum(), recorded[name])[0], rtol=1e-10, atol=1e-12)


def test_run_with_cache_gives_gradients_of_activations(model, vpd, tokens):
    with vpd.attach(model):
        names = ["blocks.1.hook_out_component_acts", "blocks.1.hook_mlp_out"]
        _, cache = model.run_with_cache(tokens, return_type="loss", incl_bwd=True, names_filter=names)
    by_acts, by_output = (cache[f"{n}_grad"] for n in names)
    assert_close(by_acts, by_output @ vpd.U[OUT].detach().T, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", ["unmasked", "rounded", "stochastic"])
def test_training_signal_reaches_v_and_u(model, vpd, tokens, mode):
    step = 1e-5

    def loss():
        with attached.masked(mode, sites=[IN], **options_of(mode, seed=0)):
            return model(tokens, return_type="loss")

    with vpd.attach(model) as attached:
        for part, index in ((vpd.V[IN], (3, 1)), (vpd.U[IN], (1, 5))):
            (gradient,) = torch.autograd.grad(loss(), part)
            with torch.no_grad():
                part[index] += step
                more = loss()
                part[index] -= 2 * step
                less = loss()
                part[index] += step
            assert_close(gradient[index], (more - less) / (2 * step), rtol=1e-5, atol=1e-9)


def test_importances_have_a_gradient_to_gamma_and_none_to_the_target(model, vpd, tokens):
    with vpd.attach(model):
        _, recorded = cached(model, tokens, "blocks.1.hook_in_ci")
        (-recorded["blocks.1.hook_in_ci"].sum()).backward()
    assert vpd.gamma.unembed.weight.grad is not None and bool((vpd.gamma.unembed.weight.grad != 0).any())
    assert all(p.grad is None for p in [*model.parameters(), *vpd.components.parameters()])


@pytest.mark.parametrize("name", ["blocks.0.hook_mlp_out", "blocks.0.attn.hook_q", "blocks.1.hook_resid_pre"])
def test_users_backward_hooks_see_the_masked_models_gradient(model, vpd, tokens, name):
    grads = []
    with vpd.attach(model) as attached, attached.masked("rounded"):
        model.add_hook(name, lambda g, hook: grads.append(g.clone()), dir="bwd")
        logits, recorded = cached(model, tokens, name)
        (expected,) = torch.autograd.grad(logits.sum(), recorded[name], retain_graph=True)
        logits.sum().backward()
        model.reset_hooks()
    assert_close(grads[-1], expected, rtol=1e-10, atol=1e-12)
