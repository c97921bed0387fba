"""What ``ActivationCache`` computes from a masked pass is what it computes from an edited model's, or it refuses."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from transformer_lens import ActivationCache

from tests.tools.conftest import case_of
from tests.tools.models import KINDS, drawn_masks, edit
from tl_vpd.masking import Masks
from tl_vpd.site import select

TIGHT = dict(rtol=1e-8, atol=1e-9)
BY_HEAD = [kind for kind in KINDS if kind != "native_bridge"]
"""The kinds that TransformerLens gives ``use_attn_result``."""


def cached(case, *, sites=None):
    """The cache of a masked pass, and the weight-edited twin's with the same sites edited."""
    names = select(sites, case.vpd.sites)
    twin = edit(case.fresh(), case.vpd, {n: m for n, m in drawn_masks(case.vpd).items() if n in names})
    with torch.no_grad():
        with case.vpd.attach(case.model) as attached, attached.masked(Masks({n: case.masks[n] for n in names})):
            _, cache = case.model.run_with_cache(case.tokens)
        _, edited = twin.run_with_cache(case.tokens)
    return cache, edited


COMPUTATIONS = {
    "accumulated_resid": lambda c: c.accumulated_resid(),
    "accumulated_resid, middle, norm": lambda c: c.accumulated_resid(incl_mid=True, apply_ln=True, layer=1),
    "decompose_resid": lambda c: c.decompose_resid(),
    "decompose_resid, norm": lambda c: c.decompose_resid(apply_ln=True, pos_slice=-1),
    "logit_attrs": lambda c: c.logit_attrs(c.decompose_resid(), tokens=3),
    "logit_attrs, difference": lambda c: c.logit_attrs(c.accumulated_resid(), tokens=3, incorrect_tokens=5),
    "stack_activation": lambda c: c.stack_activation("mlp_out"),
    "apply_ln_to_stack": lambda c: c.apply_ln_to_stack(c.decompose_resid(), layer=1, mlp_input=True),
}


@pytest.mark.parametrize("computation", COMPUTATIONS)
def test_the_residual_stream_of_a_masked_pass_is_an_edited_models(case, computation):
    cache, edited = cached(case)
    expected = COMPUTATIONS[computation](edited)
    assert_close(COMPUTATIONS[computation](cache), expected, **TIGHT)
    _, plain = case.fresh().run_with_cache(case.tokens)
    assert not torch.allclose(expected, COMPUTATIONS[computation](plain))


def test_stacks_of_our_own_activations(case):
    cache, _ = cached(case)
    stack = cache.stack_activation("q_component_acts")
    assert torch.equal(stack, torch.stack([cache["q_component_acts", 0], cache["q_component_acts", 1]]))


READS_W_O = {
    "stack_head_results": lambda c: c.stack_head_results(),
    "stack_head_results, one layer, norm": lambda c: c.stack_head_results(layer=1, apply_ln=True, incl_remainder=True),
    "compute_head_results": lambda c: c.compute_head_results() or c["result", 1],
    "get_full_resid_decomposition": lambda c: c.get_full_resid_decomposition(expand_neurons=False),
}
READS_W_OUT = {
    "get_neuron_results": lambda c: c.get_neuron_results(1, neuron_slice=(0, 5)),
    "stack_neuron_results": lambda c: c.stack_neuron_results(2, neuron_slice=(0, 5)),
    "stack_neuron_results, norm": lambda c: c.stack_neuron_results(2, apply_ln=True, incl_remainder=True),
    "get_full_resid_decomposition": lambda c: c.get_full_resid_decomposition(expand_neurons=True, pos_slice=-1),
}


@pytest.mark.parametrize("computation", READS_W_O)
def test_heads_results_of_a_masked_w_o_are_refused_where_only_the_stored_weight_is_at_hand(case, computation):
    cache, _ = cached(case, sites="*.W_O")
    with pytest.raises(ValueError, match=r"blocks.0.attn.W_O, blocks.1.attn.W_O .*set_use_attn_result\(True\)"):
        READS_W_O[computation](cache)


@pytest.mark.parametrize("computation", READS_W_O)
@pytest.mark.parametrize("kind", BY_HEAD)
def test_heads_results_are_right_when_they_are_cached(kind, computation):
    case = case_of(kind)
    case.model.set_use_attn_result(True)
    with torch.no_grad(), case.vpd.attach(case.model) as attached, attached.masked(case.masks):
        _, cache = case.model.run_with_cache(case.tokens)
    case.twin.set_use_attn_result(True)
    _, edited = case.twin.run_with_cache(case.tokens)
    assert_close(READS_W_O[computation](cache), READS_W_O[computation](edited), **TIGHT)
    total = cache.stack_head_results().unflatten(0, (2, -1)).sum(1) + case.model.b_O[:, None, None]
    assert_close(total, cache.stack_activation("attn_out"), **TIGHT)


@pytest.mark.parametrize("kind", BY_HEAD)
def test_heads_results_that_are_cached_without_a_batch_dimension_are_used(kind):
    """TransformerLens 3.9 computes these anew from the stored weight, whose result would be wrong."""
    case = case_of(kind)
    row = case.tokens[:1]
    case.model.set_use_attn_result(True)
    with torch.no_grad(), case.vpd.attach(case.model) as attached, attached.masked(case.masks):
        _, cache = case.model.run_with_cache(row, remove_batch_dim=True)
        _, with_batch = case.model.run_with_cache(row)
    assert_close(cache.stack_head_results(), with_batch.stack_head_results()[:, 0], **TIGHT)


@pytest.mark.parametrize("computation", READS_W_OUT)
def test_neurons_results_of_a_masked_w_out_are_refused(case, computation):
    cache, _ = cached(case, sites="*.W_out")
    with pytest.raises(ValueError, match=r"neurons .*blocks\.0\.mlp\.W_out, blocks\.1\.mlp\.W_out"):
        READS_W_OUT[computation](cache)


@pytest.mark.parametrize(("computations", "sites"), [(READS_W_O, "*.mlp.*"), (READS_W_OUT, "*.attn.W_[QKV]")])
def test_masks_on_other_sites_leave_them_right(case, computations, sites):
    cache, edited = cached(case, sites=sites)
    for name, computation in computations.items():
        assert_close(computation(cache), computation(edited), **TIGHT, msg=lambda m, n=name: f"{n}: {m}")


def test_an_ablation_or_a_patch_of_w_o_counts_and_looking_does_not(case):
    with torch.no_grad(), case.vpd.attach(case.model) as attached:
        ablation = case.vpd.ablation_hooks("blocks.1.attn.W_O:2")
        with case.model.hooks(fwd_hooks=ablation):
            _, by_hooks = case.model.run_with_cache(case.tokens)
        with attached.ablated("blocks.1.attn.W_O:2", pos=3):
            _, by_context = case.model.run_with_cache(case.tokens)
        with case.model.hooks(fwd_hooks=[("blocks.1.hook_o_component_acts", lambda a, hook: a * 2)]):
            _, patched = case.model.run_with_cache(case.tokens)
        _, looked_at = case.model.run_with_cache(case.tokens)
        with attached.masked("unmasked", delta=1.0):
            _, at_one = case.model.run_with_cache(case.tokens)
    for cache in (by_hooks, by_context, patched):
        with pytest.raises(ValueError, match=r"blocks\.1\.attn\.W_O had another output"):
            cache.stack_head_results()
    expected = case.fresh().run_with_cache(case.tokens)[1].stack_head_results()
    for cache in (looked_at, at_one):
        assert type(cache) is ActivationCache
        assert_close(cache.stack_head_results(), expected, **TIGHT)


def test_what_is_made_of_a_masked_cache_refuses_too(case):
    cache, _ = cached(case)
    assert isinstance(cache, ActivationCache)
    part = cache.apply_slice_to_batch_dim([0])
    assert part["resid_post", 1].shape[0] == 1
    for other in (part, cache.to("cpu"), cache.apply_slice_to_batch_dim(0)):
        with pytest.raises(ValueError, match="stored weight"):
            other.stack_head_results()
