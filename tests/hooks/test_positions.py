"""Masked positions: masked there, untouched elsewhere, and open to every other hook."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from tests.tiny import options_of, tiny_model
from tl_vpd.hooks.positions import position_indices
from tl_vpd.masking import Masks, SiteMask

from .test_edited import by_token
from .test_generate import generate
from .test_hook_lists import by_size

OUT = "blocks.1.mlp.W_out"


def masks_in(cache, vpd):
    return {
        n: (cache[s.hook_name("mask")], cache[s.hook_name("delta_mask")].reshape(cache[s.hook_name("mask")].shape[:-1]))
        for n, s in vpd.sites.items()
    }


@pytest.mark.parametrize("pos", [3, -2, [0, 5], (1,), slice(2, 4), slice(None, None, -3)])
def test_masked_positions_are_masked_and_the_others_run_as_they_are(model, vpd, tokens, pos):
    where = torch.zeros(7, dtype=torch.bool)
    where[list(range(7)[pos]) if isinstance(pos, slice) else list(pos) if isinstance(pos, tuple | list) else pos] = True
    ci = vpd.causal_importances(model, tokens)
    routing = {n: where.expand(2, 7) for n in vpd.sites}
    with torch.no_grad(), vpd.attach(model) as attached:
        clean = model(tokens)
        for mode in ("rounded", "zero"):
            site_masks = ci.masks(mode)
            with attached.masked(site_masks.routed(routing)):
                expected = model(tokens)
            for given in (mode, site_masks, lambda site, acts, site_masks=site_masks: site_masks[site]):
                with attached.masked(given, pos=pos):
                    got = model(tokens)
                assert_close(got, expected, rtol=1e-10, atol=1e-10)
                first = int(where.int().argmax())
                assert torch.equal(got[:, :first], clean[:, :first])
        assert not torch.equal(got, clean)


def test_at_positions_that_are_not_masked_the_cache_shows_ones(model, vpd, tokens):
    with torch.no_grad(), vpd.attach(model) as attached, attached.masked("zero", pos=[1, 4]):
        _, cache = model.run_with_cache(tokens)
    expected = torch.ones(7, dtype=torch.float64)
    expected[[1, 4]] = 0
    for mask, delta in masks_in(cache, vpd).values():
        assert torch.equal(mask, expected[:, None].expand(2, 7, 6)) and torch.equal(delta, expected.expand(2, 7))


def test_hooks_act_at_positions_that_a_mode_leaves_alone(model, vpd, tokens):
    """A mode at some positions does not switch off what users do at the others."""
    names = ["blocks.1.hook_mlp_out", "blocks.1.hook_out_component_acts"]
    U = vpd.U[OUT].detach()

    def add(acts, hook):
        acts[:, 5, 2] += 0.5

    for mode in ("zero", "rounded"):
        with torch.no_grad(), vpd.attach(model) as attached, attached.masked(mode, pos=3, sites=OUT):
            _, plain = model.run_with_cache(tokens, names_filter=names)
            with attached.ablated(f"{OUT}:1", pos=5):
                _, ablated = model.run_with_cache(tokens, names_filter=names)
            with model.hooks(fwd_hooks=[(names[1], add)]):
                _, patched = model.run_with_cache(tokens, names_filter=names)
            with model.hooks(fwd_hooks=vpd.delta_hooks(0.0, pos=5, sites=OUT)):
                _, without = model.run_with_cache(tokens, names_filter=names)
        acts = plain["out_component_acts", 1]
        change = torch.zeros(2, 7, 8, dtype=torch.float64)
        change[:, 5] = -acts[:, 5, 1, None] * U[1]
        assert_close(ablated["mlp_out", 1], plain["mlp_out", 1] + change, rtol=1e-10, atol=1e-11)
        change[:, 5] = 0.5 * U[2]
        assert_close(patched["mlp_out", 1], plain["mlp_out", 1] + change, rtol=1e-10, atol=1e-11)
        change[:, 5] = acts[:, 5] @ U + model.blocks[1].mlp.b_out.detach() - plain["mlp_out", 1][:, 5]
        assert_close(without["mlp_out", 1], plain["mlp_out", 1] + change, rtol=1e-10, atol=1e-11)


def test_positions_narrow_the_routing_that_masks_bring(model, vpd, tokens):
    masks = by_token(vpd, routed=True)
    where = torch.zeros(7, dtype=torch.bool)
    where[2:6] = True
    both = Masks({n: SiteMask(m.mask, m.delta, m.routed & where) for n, m in masks.items()})
    with torch.no_grad(), vpd.attach(model) as attached:
        with attached.masked(both):
            expected = model(tokens)
        for given in (masks, lambda site, acts: masks[site]):
            with attached.masked(given, pos=slice(2, 6)):
                assert_close(model(tokens), expected, rtol=1e-10, atol=1e-10)


def test_stochastic_and_adversarial_masks_at_some_positions(model, vpd, tokens):
    with torch.no_grad(), vpd.attach(model) as attached:
        clean = model(tokens)
        for mode in ("stochastic", "adversarial"):
            with attached.masked(mode, pos=[4], **options_of(mode, seed=2, steps=2)):
                got, cache = model.run_with_cache(tokens, names_filter=lambda n: n.endswith("_mask"))
            assert torch.equal(got[:, :4], clean[:, :4]) and not torch.equal(got[:, 4], clean[:, 4])
            others = [0, 1, 2, 3, 5, 6]
            for mask, delta in masks_in(cache, vpd).values():
                assert bool((mask[:, others] == 1).all()) and bool((delta[:, others] == 1).all())
            assert any(bool((mask[:, 4] < 1).any()) for mask, _ in masks_in(cache, vpd).values())


def test_a_position_of_a_kv_cached_step_is_of_that_step(model, vpd, tokens):
    with torch.no_grad(), vpd.attach(model) as attached, attached.masked("zero", pos=-1):
        step_by_step = generate(model, tokens)
    grown = tokens
    with torch.no_grad(), vpd.attach(model) as attached:
        for end in range(7, 10):
            with attached.masked("zero", pos=list(range(6, end))):
                grown = torch.cat([grown, model(grown)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(step_by_step, grown)


def test_a_position_that_does_not_exist_is_said(model, vpd, tokens):
    with torch.no_grad(), vpd.attach(model) as attached:
        for mode in ("zero", "rounded", "adversarial", by_size):
            with (
                pytest.raises(IndexError, match="pos=7 is outside the 7 positions"),
                attached.masked(mode, pos=7, **options_of(mode, steps=1)),
            ):
                model(tokens)
        with pytest.raises(IndexError, match=r"outside the 7 positions at blocks\.0\.hook_q_delta_mask"):
            model.run_with_hooks(tokens, fwd_hooks=vpd.delta_hooks(0.0, pos=[1, -8]))
        assert torch.equal(model(tokens), tiny_model()(tokens))


@pytest.mark.parametrize(
    ("given", "same"),
    [
        (torch.tensor([False, True, False, True, False, False, False]), [1, 3]),
        (np.array([False, True, False, True, False, False, False]), [1, 3]),
        (torch.tensor([1, 3]), [1, 3]),
        (np.array([1, -1]), [1, 6]),
        (torch.tensor(3), [3]),
        (np.int64(3), [3]),
        (range(2, 5), [2, 3, 4]),
    ],
    ids=str,
)
def test_positions_may_be_tensors_arrays_and_masks(model, vpd, tokens, given, same):
    with torch.no_grad(), vpd.attach(model) as attached:
        with attached.masked("zero", pos=same):
            expected = model(tokens)
        with attached.masked("zero", pos=given):
            assert torch.equal(model(tokens), expected)
        hooks = [vpd.ablation_hooks([f"{OUT}:1"], pos=where) for where in (given, same)]
        one, two = (model.run_with_hooks(tokens, fwd_hooks=fwd_hooks) for fwd_hooks in hooks)
        assert torch.equal(one, two) and not torch.equal(one, model(tokens))


indices = st.lists(st.integers(-7, 6), min_size=1, max_size=9)
slices = st.builds(slice, *[st.none() | st.integers(-9, 9)] * 2, st.none() | st.integers(-3, 3).filter(bool))


@given(chosen=indices, form=st.sampled_from([list, tuple, np.array, torch.tensor, lambda p: [np.int16(i) for i in p]]))
def test_indices_of_any_form_are_pythons(chosen, form):
    result = position_indices(form(chosen), 7, torch.device("cpu"), "")
    assert result.tolist() == [range(7)[i] for i in chosen] and result.dtype == torch.int64


@given(
    selects=st.lists(st.booleans(), min_size=7, max_size=7).filter(any),
    form=st.sampled_from([list, np.array, torch.tensor]),
)
def test_masks_of_any_form_are_the_positions_where_they_are_true(selects, form):
    expected = [i for i, selected in enumerate(selects) if selected]
    assert position_indices(form(selects), 7, torch.device("cpu"), "").tolist() == expected
    with pytest.raises(IndexError, match="pos is a mask of 7 positions, and there are 6 at here"):
        position_indices(form(selects), 6, torch.device("cpu"), "here")


@given(pos=slices)
def test_slices_are_pythons_and_those_that_select_none_are_refused(pos):
    expected = list(range(7)[pos])
    if expected:
        assert position_indices(pos, 7, torch.device("cpu"), "").tolist() == expected
        return
    with pytest.raises(IndexError, match="selects none of the 7 positions at here"):
        position_indices(pos, 7, torch.device("cpu"), "here")
