"""``transformer_lens.patching`` on attached models (the plain model's numbers), masked ones (an edited one's), and our hooks."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.testing import assert_close
from transformer_lens import patching

from tests.tools.conftest import case_of
from tests.tools.models import KINDS

CLOSE = dict(rtol=1e-5, atol=1e-6, check_dtype=False)  # tables are float32
PATCHERS = sorted(
    name
    for name, function in vars(patching).items()
    if name.startswith("get_act_patch_")
    and not name.endswith(("by_pos_every", "dest_src_pos"))
    and "direct_path" not in name
)
"""The family, each called as ``function(model, corrupted_tokens, clean_cache, metric)``: without the one that combines others
over many passes, the one over pairs of positions, and 4.x's direct paths, which compute with the stored W_O."""


def metric(logits):
    """A difference of two logits at the last position."""
    return logits[0, -1, 3] - logits[0, -1, 5]


def patched(model, function, case, cache):
    with torch.no_grad():
        return function(model, case.other_tokens[:1], cache, metric)


def test_the_family_is_all_here():
    assert {"get_act_patch_resid_pre", "get_act_patch_attn_head_out_by_pos", "get_act_patch_block_every"} <= set(
        PATCHERS
    )
    assert len(PATCHERS) >= 16
    parameters = list(inspect.signature(patching.get_act_patch_resid_pre).parameters)
    assert parameters[:4] == ["model", "corrupted_tokens", "clean_cache", "patching_metric"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_patching_function_gives_the_plain_models_numbers_when_attached_and_an_edited_models_when_masked(kind):
    """One model a kind and all functions of the family, each over every layer, position and head."""
    case = case_of(kind)
    plain = case.fresh()
    clean = case.tokens[:1]
    with torch.no_grad():
        _, plain_cache = plain.run_with_cache(clean)
        _, edited_cache = case.twin.run_with_cache(clean)
        with case.vpd.attach(case.model) as attached:
            _, cache = case.model.run_with_cache(clean)
            with attached.masked(case.masks):
                _, masked_cache = case.model.run_with_cache(clean)
    for name in PATCHERS:
        function = getattr(patching, name)
        expected, edited = (patched(m, function, case, c) for m, c in ((plain, plain_cache), (case.twin, edited_cache)))
        with case.vpd.attach(case.model) as attached:
            assert torch.equal(patched(case.model, function, case, cache), expected), name
            with attached.masked(case.masks):
                got = patched(case.model, function, case, masked_cache)
        assert_close(got, edited, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
        assert not torch.allclose(got, expected), name


def test_patching_one_activation_at_a_time(case):
    """``generic_activation_patch`` on inner activations: against hooks set by hand."""
    clean, corrupted = case.tokens[:1], case.other_tokens[:1]
    with torch.no_grad(), case.vpd.attach(case.model):
        _, cache = case.model.run_with_cache(clean)
        table = patching.generic_activation_patch(
            case.model,
            corrupted,
            cache,
            metric,
            patch_setter=patching.layer_pos_patch_setter,
            activation_name="v_component_acts",
            index_axis_names=("layer", "pos"),
        )
        assert table.shape == (2, clean.shape[1])
        for layer in range(2):
            for pos in (0, 3):
                name = f"blocks.{layer}.hook_v_component_acts"

                def from_clean(acts, hook, pos=pos):
                    acts[:, pos] = cache[hook.name][:, pos]
                    return acts

                by_hand = metric(case.model.run_with_hooks(corrupted, fwd_hooks=[(name, from_clean)]))
                assert_close(table[layer, pos], by_hand, **CLOSE)
        assert table.unique().numel() > 4


def test_patching_all_inner_activations_of_a_site_patches_the_part_that_v_and_u_explain(case):
    """Every site's y moves by (a_clean − a) @ U; with a full-rank V @ U = W that is all of it."""
    site, layer = "blocks.0.attn.W_V", 0
    clean, corrupted = case.tokens[:1], case.other_tokens[:1]
    U = case.vpd.U[site].detach()
    plain = case.fresh()
    with torch.no_grad(), case.vpd.attach(case.model):
        _, cache = case.model.run_with_cache(clean)
        _, here = case.model.run_with_cache(corrupted)
        moved = (cache["v_component_acts", layer] - here["v_component_acts", layer]) @ U
        got = case.model.run_with_hooks(
            corrupted, fwd_hooks=[("blocks.0.hook_v_component_acts", lambda a, hook: cache[hook.name])]
        )
    expected = plain.run_with_hooks(
        corrupted, fwd_hooks=[("blocks.0.attn.hook_v", lambda v, hook: v + moved.reshape(v.shape))]
    )
    assert_close(got, expected, **CLOSE)
    assert not torch.allclose(expected, plain(corrupted))
