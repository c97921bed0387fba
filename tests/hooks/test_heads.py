"""Inputs and results by head: hooks that touch one head, and what the cache makes of results."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.tiny import decomposition_of, draw, edited, some_tokens, tiny_model

from .flagged import GROUPED, set_flags
from .test_edited import as_masks, constant


@pytest.mark.parametrize(
    ("architecture", "flags", "point", "site"),
    [
        ({}, ["use_split_qkv_input"], "hook_q_input", "W_Q"),
        ({}, ["use_split_qkv_input"], "hook_k_input", "W_K"),
        ({}, ["use_split_qkv_input"], "hook_v_input", "W_V"),
        ({}, ["use_attn_in"], "hook_attn_in", "W_V"),
        (GROUPED, ["use_split_qkv_input"], "hook_k_input", "W_K"),
        (GROUPED, ["use_split_qkv_input", "ungroup_grouped_query_attention"], "hook_v_input", "W_V"),
    ],
)
def test_an_input_changed_for_one_head_passes_through_that_heads_masked_weight(architecture, flags, point, site):
    model = tiny_model(**architecture)
    set_flags(model, flags)
    vpd, tokens = decomposition_of(model).double(), some_tokens()

    def change(x, hook):
        x[:, 2:, 1] += draw(5, 8, seed=3)
        return x

    hooks = [(f"blocks.1.{point}", change)]
    masks = constant(vpd)
    expected = edited(model, vpd, masks).run_with_hooks(tokens, fwd_hooks=hooks)
    with torch.no_grad(), vpd.attach(model) as attached:
        clean = model.run_with_hooks(tokens, fwd_hooks=hooks)
        with attached.masked(as_masks(masks)):
            got = model.run_with_hooks(tokens, fwd_hooks=hooks)
            assert not torch.equal(got, model(tokens))
        assert_close(got, expected, rtol=1e-10, atol=1e-10)
        with attached.masked("unmasked", delta=1.0):
            assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=hooks), clean)
        # Ablating a subcomponent acts on the changed head's activation.
        name = f"blocks.1.attn.{site}"
        mask = torch.ones(6, dtype=torch.float64)
        mask[3] = 0
        ablated = model.run_with_hooks(tokens, fwd_hooks=[*hooks, *vpd.ablation_hooks(f"{name}:3")])
    by_weight = edited(model, vpd, {name: (mask, 1.0)}).run_with_hooks(tokens, fwd_hooks=hooks)
    assert_close(ablated, by_weight, rtol=1e-10, atol=1e-10)


def test_activations_shown_are_the_mean_of_the_heads_and_a_patch_reaches_every_head(model, vpd, tokens):
    model.set_use_split_qkv_input(True)
    name, delta = "blocks.1.hook_q_component_acts", draw(8, seed=5)

    def change(x, hook):
        x[:, :, 1] += delta
        return x

    def add(acts, hook):
        acts[..., 2] += 0.7

    with torch.no_grad(), vpd.attach(model):
        _, plain = model.run_with_cache(tokens, names_filter=[name, "blocks.1.hook_resid_pre"])
        with model.hooks(fwd_hooks=[("blocks.1.hook_q_input", change)]):
            _, cache = model.run_with_cache(tokens, names_filter=[name, "blocks.1.attn.hook_q"])
            with model.hooks(fwd_hooks=[(name, add)]):
                _, patched = model.run_with_cache(tokens, names_filter=["blocks.1.attn.hook_q"])
        V, U = vpd.V["blocks.1.attn.W_Q"], vpd.U["blocks.1.attn.W_Q"]
        by_head = [model.blocks[1].ln1(x) @ V for x in (plain["resid_pre", 1], plain["resid_pre", 1] + delta)]
        assert_close(cache[name], (by_head[0] + by_head[1]) / 2, rtol=1e-9, atol=1e-10)
        wrote = (patched["q", 1] - cache["q", 1]).flatten(2)
    assert_close(wrote, (0.7 * U[2].detach()).expand(2, 7, 8), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("architecture", [{}, GROUPED])
def test_stacked_head_results_of_a_masked_model_are_the_edited_models(architecture):
    model = tiny_model(**architecture)
    model.set_use_attn_result(True)
    vpd, tokens = decomposition_of(model).double(), some_tokens()
    masks = constant(vpd)
    with torch.no_grad():
        _, expected = edited(model, vpd, masks).run_with_cache(tokens)
        with vpd.attach(model) as attached, attached.masked(as_masks(masks)):
            _, cache = model.run_with_cache(tokens)
    got, labels = cache.stack_head_results(layer=-1, return_labels=True)
    assert labels == [f"L{i}H{h}" for i in range(2) for h in range(model.cfg.n_heads)]
    assert_close(got, expected.stack_head_results(layer=-1), rtol=1e-9, atol=1e-10)
    by_head = cache["result", 1]
    assert_close(by_head.sum(-2) + model.blocks[1].attn.b_O, cache["attn_out", 1], rtol=1e-9, atol=1e-10)
    assert_close(cache["result", 1], expected["result", 1], rtol=1e-9, atol=1e-10)


def test_a_patched_activation_of_w_o_is_shared_out_over_the_heads(model, vpd, tokens):
    model.set_use_attn_result(True)
    U = vpd.U["blocks.0.attn.W_O"].detach()

    def add(acts, hook):
        acts[..., 2] += 0.7

    names = ["blocks.0.attn.hook_result", "blocks.0.hook_attn_out"]
    with torch.no_grad(), vpd.attach(model):
        _, plain = model.run_with_cache(tokens, names_filter=names)
        with model.hooks(fwd_hooks=[("blocks.0.hook_o_component_acts", add)]):
            _, cache = model.run_with_cache(tokens, names_filter=names)
    assert_close(cache["result", 0] - plain["result", 0], (0.35 * U[2]).expand(2, 7, 2, 8), rtol=1e-9, atol=1e-10)
    assert_close(cache["attn_out", 0] - plain["attn_out", 0], (0.7 * U[2]).expand(2, 7, 8), rtol=1e-9, atol=1e-10)


def test_a_hook_on_one_heads_result_acts_after_the_mask(model, vpd, tokens):
    model.set_use_attn_result(True)
    masks = constant(vpd)

    def drop(result, hook):
        result[:, :, 1] = 0
        return result

    hooks = [("blocks.0.attn.hook_result", drop)]
    expected = edited(model, vpd, masks).run_with_hooks(tokens, fwd_hooks=hooks)
    with torch.no_grad(), vpd.attach(model) as attached, attached.masked(as_masks(masks)):
        assert_close(model.run_with_hooks(tokens, fwd_hooks=hooks), expected, rtol=1e-10, atol=1e-10)


def test_generation_with_a_kv_cache_under_a_flag_is_that_without(model, vpd, tokens):
    from .test_generate import generate, greedy

    set_flags(model, ["use_split_qkv_input", "use_attn_result"])
    addresses = [f"{n}:{i}" for n in vpd.sites for i in (0, 3)]
    with torch.no_grad(), vpd.attach(model) as attached:
        for context in (attached.ablated(addresses), attached.masked("zero"), attached.keep_only(addresses)):
            with context:
                assert torch.equal(generate(model, tokens, use_past_kv_cache=True), greedy(model, tokens))
