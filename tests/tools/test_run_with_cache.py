"""``run_with_cache`` with every option, on an attached model (what it was) and on a masked one (an edited model's)."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

KINDS_OF_HOOKS = ("component_acts", "ci", "mask", "delta_mask")


def same(got, expected, names=None):
    """Every tensor of ``expected`` (or those named) is in ``got``, to the last few bits."""
    for name in names or expected.keys():
        assert_close(got[name], expected[name], rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def hook_name(case, site, kind):
    return case.vpd.sites[site].hook_name(kind)


def test_everything_is_cached_as_it_was_and_ours_beside_it(case):
    logits, plain = case.fresh().run_with_cache(case.tokens)
    with case.vpd.attach(case.model):
        got, cache = case.model.run_with_cache(case.tokens)
    assert torch.equal(got, logits)
    assert all(torch.equal(cache[n], plain[n]) for n in plain.keys())  # noqa: SIM118
    our_names = {hook_name(case, site, kind) for site in case.vpd.sites for kind in KINDS_OF_HOOKS}
    assert set(cache.keys()) - set(plain.keys()) == our_names


def test_a_masked_model_caches_what_an_edited_one_does(case):
    logits, edited = case.twin.run_with_cache(case.tokens)
    with case.vpd.attach(case.model) as attached, attached.masked(case.masks):
        got, cache = case.model.run_with_cache(case.tokens)
    assert_close(got, logits, rtol=1e-9, atol=1e-10)
    same(cache, edited)


FILTERS = {
    "a name": lambda names: names[0],
    "names": list,
    "a function": lambda names: lambda name: name in names,
}


@pytest.mark.parametrize("form", FILTERS)
def test_a_names_filter_keeps_what_it_names(case, form):
    ours = hook_name(case, "blocks.1.mlp.W_in", "component_acts")
    names = [ours, "blocks.0.attn.hook_pattern", "blocks.1.hook_q_ci"]
    kept = names[:1] if form == "a name" else names
    with case.vpd.attach(case.model):
        _, everything = case.model.run_with_cache(case.tokens)
        _, cache = case.model.run_with_cache(case.tokens, names_filter=FILTERS[form](names))
    assert set(kept) == set(cache.keys())
    same(cache, everything, kept)


def test_a_names_filter_computes_only_what_it_asks_for(case):
    """Counted in multiply-adds: one product for one site's activations, none for TransformerLens's names."""

    def cost(names_filter):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            case.model.run_with_cache(case.tokens, names_filter=names_filter)
        return counter.get_total_flops()

    plain = cost("blocks.0.attn.hook_pattern")
    site = "blocks.1.attn.W_K"
    shape = (*case.tokens.shape, *case.vpd.V[site].shape)
    with case.vpd.attach(case.model):
        assert cost("blocks.0.attn.hook_pattern") == plain
        assert cost(lambda name: False) == plain
        assert cost(hook_name(case, site, "component_acts")) == plain + 2 * torch.Size(shape).numel()


def test_without_the_batch_dimension(case):
    row = case.tokens[:1]
    with case.vpd.attach(case.model):
        _, with_batch = case.model.run_with_cache(row)
        _, cache = case.model.run_with_cache(row, remove_batch_dim=True)
    assert not cache.has_batch_dim
    our_names = [hook_name(case, site, kind) for site in case.vpd.sites for kind in KINDS_OF_HOOKS]
    same(cache, {n: with_batch[n][0] for n in [*our_names, "blocks.1.hook_resid_post", "blocks.0.attn.hook_z"]})


@pytest.mark.parametrize("pos", [-1, 2, [1, 3], (1, 5, 2)])
def test_a_slice_of_positions(case, pos):
    names = [hook_name(case, s, k) for s in case.vpd.sites for k in KINDS_OF_HOOKS] + ["blocks.0.hook_resid_mid"]
    at = slice(*pos) if isinstance(pos, tuple) else [pos] if isinstance(pos, int) else pos
    with case.vpd.attach(case.model) as attached, attached.masked("stochastic", seed=0):
        _, whole = case.model.run_with_cache(case.tokens, names_filter=lambda n: n in names)
    with case.vpd.attach(case.model) as attached, attached.masked("stochastic", seed=0):
        _, cache = case.model.run_with_cache(case.tokens, names_filter=lambda n: n in names, pos_slice=pos)
    same(cache, {n: whole[n][:, at] for n in names})


def test_the_cache_is_where_it_is_asked_to_be(case):
    with case.vpd.attach(case.model):
        _, cache = case.model.run_with_cache(case.tokens, device="cpu")
        _, plain = case.model.run_with_cache(case.tokens)
    assert all(value.device.type == "cpu" for value in cache.values())
    same(cache, plain)


def test_a_plain_dictionary_instead_of_a_cache(case):
    with case.vpd.attach(case.model) as attached, attached.masked(case.masks):
        _, cache = case.model.run_with_cache(case.tokens)
        _, plain = case.model.run_with_cache(case.tokens, return_cache_object=False)
    assert type(plain) is dict and plain.keys() == cache.cache_dict.keys()
    same(plain, cache)


def test_stopping_at_a_layer(case):
    our_names = {hook_name(case, s, k) for s in case.vpd.sites for k in ("component_acts", "mask", "delta_mask")}
    expected, plain = case.fresh().run_with_cache(case.tokens, stop_at_layer=1)
    with case.vpd.attach(case.model) as attached:
        wanted = our_names | set(plain.keys())
        got, cache = case.model.run_with_cache(case.tokens, stop_at_layer=1, names_filter=lambda n: n in wanted)
        assert torch.equal(got, expected)
        assert set(cache.keys()) == set(plain.keys()) | {n for n in our_names if n.startswith("blocks.0.")}
        with attached.masked(case.masks):
            masked, _ = case.model.run_with_cache(case.tokens, stop_at_layer=1, names_filter=lambda n: False)
        with pytest.raises(ValueError, match="stop_at_layer"):
            case.model.run_with_cache(
                case.tokens, stop_at_layer=1, names_filter=hook_name(case, "blocks.0.attn.W_Q", "ci")
            )
    edited, _ = case.twin.run_with_cache(case.tokens, stop_at_layer=1, names_filter=lambda n: False)
    assert_close(masked, edited, rtol=1e-9, atol=1e-10)


def test_gradients_are_cached_beside_activations(case):
    site, tokens = "blocks.0.attn.W_V", case.tokens
    acts = hook_name(case, site, "component_acts")
    names = [acts, "blocks.0.attn.hook_v", "blocks.1.hook_resid_pre"]
    with case.vpd.attach(case.model):
        _, cache = case.model.run_with_cache(
            tokens, return_type="loss", incl_bwd=True, names_filter=lambda n: n in names
        )
    twin = case.fresh()
    _, plain = twin.run_with_cache(tokens, return_type="loss", incl_bwd=True, names_filter=lambda n: n in names)
    same(cache, {n: plain[n] for n in names[1:]})
    same(cache, {f"{n}_grad": plain[f"{n}_grad"] for n in names[1:]})
    # With masks at 1 an activation writes along U[c] alone.
    to_v = plain["blocks.0.attn.hook_v_grad"].flatten(2)
    assert_close(cache[f"{acts}_grad"], to_v @ case.vpd.U[site].detach().T, rtol=1e-8, atol=1e-10)


def test_gradients_under_masks_are_an_edited_models(case):
    names = ["blocks.0.attn.hook_pattern", "blocks.0.hook_resid_mid", "blocks.1.attn.hook_z"]
    options = dict(return_type="loss", incl_bwd=True, names_filter=lambda n: n in names)
    _, edited = case.twin.run_with_cache(case.tokens, **options)
    with case.vpd.attach(case.model) as attached, attached.masked(case.masks):
        _, cache = case.model.run_with_cache(case.tokens, **options)
    same(cache, edited)


def test_hooks_that_are_left_on_go_on_caching_until_they_are_reset(case):
    name = hook_name(case, "blocks.1.mlp.W_out", "component_acts")
    with case.vpd.attach(case.model):
        _, cache = case.model.run_with_cache(case.tokens, names_filter=name, reset_hooks_end=False)
        first = cache[name].clone()
        case.model(case.other_tokens)
        assert not torch.equal(cache[name], first)
        case.model.reset_hooks()
        second = cache[name]
        case.model(case.tokens)
        assert cache[name] is second


def test_contexts_are_cleared_when_asked(case):
    name = hook_name(case, "blocks.1.mlp.W_out", "component_acts")
    with case.vpd.attach(case.model):
        point = case.model.hook_dict[name]
        point.ctx["note"] = 1
        case.model.run_with_cache(case.tokens, names_filter=name)
        assert point.ctx == {"note": 1}
        case.model.run_with_cache(case.tokens, names_filter=name, clear_contexts=True)
        assert point.ctx == {}
