"""Any positions, amounts, indices and masks that broadcast: hooks and contexts against a mask written out."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from tests.tiny import decomposition_of, draw, some_tokens, tiny_model
from tl_vpd.masking import Masks, SiteMask

SITES = ["blocks.0.attn.W_K", "blocks.0.attn.W_O", "blocks.0.mlp.W_out"]
BATCH, POS, C = 2, 7, 16

positions = (
    st.none()
    | st.integers(-POS, POS - 1)
    | st.lists(st.integers(-POS, POS - 1), min_size=1, max_size=4)
    | st.builds(slice, *[st.none() | st.integers(-9, 9)] * 2, st.none() | st.integers(-3, 3).filter(bool)).filter(
        lambda pos: len(range(POS)[pos]) > 0
    )
)
subcomponents = st.lists(st.tuples(st.sampled_from(SITES), st.integers(0, C - 1)), min_size=1, max_size=12)
amounts = st.floats(-2, 2, allow_nan=False)


@functools.cache
def attached():
    """One layer with sixteen subcomponents a site, attached for the whole file."""
    model = tiny_model(n_layers=1)
    vpd = decomposition_of(model, C=C).double()
    return model, vpd, some_tokens(), vpd.attach(model)


def at(pos) -> list[int]:
    result = range(POS)[pos] if isinstance(pos, slice) else range(POS) if pos is None else pos
    return [result % POS] if isinstance(result, int) else [p % POS for p in result]


@settings(max_examples=30, deadline=None)
@given(lists=st.lists(st.tuples(subcomponents, positions, amounts), min_size=1, max_size=3))
def test_any_ablations_are_the_masks_they_multiply(lists):
    model, vpd, tokens, context = attached()
    masks = {n: torch.ones(BATCH, POS, C, dtype=torch.float64) for n in SITES}
    hooks = []
    for chosen, pos, amount in lists:
        hooks += vpd.ablation_hooks([f"{n}:{i}" for n, i in chosen], pos=pos, amount=amount)
        for n, i in set(chosen):
            for p in set(at(pos)):
                masks[n][:, p, i] *= 1 - amount
    with torch.no_grad():
        got = model.run_with_hooks(tokens, fwd_hooks=hooks)
        with context.masked(Masks({n: SiteMask(m, None) for n, m in masks.items()})):
            assert_close(got, model(tokens), rtol=1e-9, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(
    chosen=subcomponents,
    pos=positions,
    amount=amounts,
    shape=st.sampled_from([(C,), (1, POS, C), (1, 1, C), (BATCH, 1, C)]),
)
def test_any_replacements_are_the_activations_they_set(chosen, pos, amount, shape):
    model, vpd, tokens, _ = attached()
    values = {n: draw(*shape, seed=i) - 0.5 for i, n in enumerate(SITES)}

    def set_by_hand(acts, hook):
        for n, i in set(chosen):
            if hook.name == vpd.sites[n].hook_name("component_acts"):
                for p in set(at(pos)):
                    column = acts[:, p, i]
                    acts[:, p, i] = column + amount * (values[n].expand(BATCH, POS, C)[:, p, i] - column)
        return acts

    by_hand = [(vpd.sites[n].hook_name("component_acts"), set_by_hand) for n in SITES]
    hooks = vpd.ablation_hooks([f"{n}:{i}" for n, i in chosen], pos=pos, amount=amount, values=values)
    with torch.no_grad():
        assert_close(
            model.run_with_hooks(tokens, fwd_hooks=hooks),
            model.run_with_hooks(tokens, fwd_hooks=by_hand),
            rtol=1e-9,
            atol=1e-9,
        )


broadcast = st.lists(st.booleans(), min_size=2, max_size=2).map(
    lambda token_mask: [n if k else 1 for n, k in zip((BATCH, POS), token_mask, strict=True)]
)


@settings(max_examples=20, deadline=None)
@given(
    rows=broadcast, of_delta=broadcast, shared=st.booleans(), masked=st.booleans(), delta=st.booleans(),
    routed=st.booleans(), pos=positions, seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_mask_that_broadcasts_means_the_mask_in_full(rows, of_delta, shared, masked, delta, routed, pos, seed):
    model, vpd, tokens, context = attached()
    small, full = {}, {}
    for i, n in enumerate(SITES):
        m, d = draw(*rows, C, seed=seed + i), draw(*of_delta, seed=seed + i + 50)
        r = draw(BATCH, POS, seed=seed + i + 99) < 0.5
        if shared and m.shape[:2] == (1, 1):  # one mask for all tokens needs no other axes
            m = m[0, 0]
        where = torch.zeros(POS, dtype=torch.bool)
        where[at(pos)] = True
        where = (where & r) if routed else where.expand(BATCH, POS)
        small[n] = SiteMask(m if masked else None, d if delta else None, r if routed else None)
        whole = m.expand(BATCH, POS, C) if masked else torch.ones(BATCH, POS, C, dtype=torch.float64)
        of = d.expand(BATCH, POS) if delta else torch.ones(BATCH, POS, dtype=torch.float64)
        full[n] = SiteMask(torch.where(where[..., None], whole, 1.0), torch.where(where, of, 1.0))
    with torch.no_grad():
        with context.masked(Masks(full)):
            expected = model(tokens)
        for given_masks in (Masks(small), lambda site, acts: small.get(site, SiteMask(None, None))):
            with context.masked(given_masks, pos=pos):
                assert_close(model(tokens), expected, rtol=1e-9, atol=1e-9)
            if pos is None:
                hooks = vpd.mask_hooks(given_masks)
                assert_close(model.run_with_hooks(tokens, fwd_hooks=hooks), expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(shape=st.lists(st.integers(1, 8), min_size=1, max_size=4))
def test_masks_of_any_other_shape_are_refused_by_name(shape):
    model, vpd, tokens, context = attached()
    full = (BATCH, POS, C)
    if len(shape) in (1, 3) and all(n in (1, m) for n, m in zip(reversed(shape), reversed(full), strict=False)):
        return
    masks = Masks({SITES[0]: SiteMask(torch.ones(shape), None)})
    for act in (
        lambda: context.masked(masks),
        lambda: model.hooks(fwd_hooks=vpd.mask_hooks(masks)),
        lambda: context.masked(lambda site, acts: torch.ones(shape)),
    ):
        with pytest.raises(ValueError, match=r"The mask for .* is .*(\(2, 7, 16\)|has 16 subcomponents)"), act():
            model(tokens)


@settings(max_examples=20, deadline=None)
@given(
    chosen=subcomponents,
    pos=positions,
    delta=st.sampled_from([None, 0.0, 0.5, 1.0]),
    sites=st.sets(st.sampled_from(SITES), min_size=1),
)
def test_keeping_anything_anywhere_is_its_indicator(chosen, pos, delta, sites):
    model, _, tokens, context = attached()
    where = torch.zeros(POS, dtype=torch.bool)
    where[at(pos)] = True
    masks = {}
    for n in sites:
        mask = torch.zeros(C, dtype=torch.float64)
        mask[[i for site, i in chosen if site == n]] = 1
        full = torch.where(where[:, None], mask, 1.0).expand(BATCH, POS, C)
        masks[n] = SiteMask(full, torch.where(where, delta or 0.0, 1.0).double().expand(BATCH, POS))
    with torch.no_grad():
        with context.masked(Masks(masks)):
            expected = model(tokens)
        with context.keep_only([f"{n}:{i}" for n, i in chosen], delta=delta, pos=pos, sites=sorted(sites)):
            assert_close(model(tokens), expected, rtol=1e-9, atol=1e-9)
