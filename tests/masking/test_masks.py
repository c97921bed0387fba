"""Masks from importances and sources: values, bounds, gradients, routing (VPD paper, section on masked forwards)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from tests.tiny import draw
from tl_vpd.masking import Masks, SiteMask, constant_masks, masks_from_sources
from tl_vpd.site import ConcatenatedAxis

PACKING = ConcatenatedAxis({"a": 2, "b": 3})


def concatenated(masks: Masks) -> torch.Tensor:
    """Masks and then Δs, on one axis."""
    return torch.cat([*(m.mask for m in masks.values()), *(m.delta[..., None] for m in masks.values())], dim=-1)


def test_masks_by_hand():
    g = torch.tensor([[[0.0, 1.0, 0.5, 0.25, 0.0]]])
    sources = torch.tensor([[[0.3, 0.3, 0.4, 0.2, 1.0, 0.7, 0.0]]])
    masks = masks_from_sources(g, sources, PACKING)
    assert_close(masks["a"].mask, torch.tensor([[[0.3, 1.0]]]))
    assert_close(masks["b"].mask, torch.tensor([[[0.7, 0.4, 1.0]]]))
    assert_close((masks["a"].delta, masks["b"].delta), (torch.tensor([[0.7]]), torch.tensor([[0.0]])))
    assert masks["a"].routed is None


@given(st.integers(0, 10_000), st.booleans())
def test_masks_lie_between_importance_and_one(seed, shared):
    g = draw(2, 3, 5, seed=seed).round(decimals=1)
    sources = draw(*((1, 1, 7) if shared else (2, 3, 7)), seed=seed + 1).round(decimals=1)
    out = concatenated(masks_from_sources(g, sources, PACKING))
    expected = torch.cat([g + (1 - g) * sources[..., :5], sources[..., 5:].expand(2, 3, 2)], dim=-1)
    assert_close(out, expected, rtol=0, atol=1e-15)
    assert bool(((out[..., :5] >= g - 1e-15) & (out <= 1).all()).all())
    assert torch.equal(out[..., :5][g == 1], torch.ones_like(g[g == 1]))


@pytest.mark.parametrize("shape", [(2, 3, 7), (1, 1, 7), (2, 1, 7), (1, 3, 7)])
def test_gradients_are_those_of_finite_differences(shape):
    g, sources = draw(2, 3, 5).requires_grad_(), draw(*shape, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda *t: concatenated(masks_from_sources(*t, PACKING)), (g, sources))
    assert torch.autograd.gradcheck(lambda s: concatenated(masks_from_sources(g.detach(), s, PACKING)), (sources,))
    assert torch.autograd.gradcheck(lambda t: concatenated(masks_from_sources(t, sources.detach(), PACKING)), (g,))


def test_constant_masks_give_every_site_one_delta():
    masks = constant_masks(draw(2, 3, 5), 0.25, PACKING)
    assert torch.equal(masks["b"].mask, draw(2, 3, 5)[..., 2:])
    assert torch.equal(masks["a"].delta, torch.full((2, 3), 0.25, dtype=torch.float64))
    by_token = constant_masks(draw(2, 3, 5), draw(2, 3), PACKING)
    assert torch.equal(by_token["a"].delta, draw(2, 3)) and torch.equal(by_token["b"].delta, draw(2, 3))


def test_only_and_routed_keep_the_rest():
    masks = constant_masks(draw(2, 3, 5), 0.0, PACKING)
    assert list(masks.only(["b"])) == ["b"] and len(masks) == 2 and repr(masks) == "Masks(a, b)"
    where = {"a": torch.ones(2, 3, dtype=torch.bool), "b": torch.zeros(2, 3, dtype=torch.bool)}
    routed = masks.routed(where)
    assert torch.equal(routed["b"].routed, where["b"]) and torch.equal(routed["b"].mask, masks["b"].mask)
    with pytest.raises(KeyError):
        masks.only(["c"])


def test_a_site_that_is_not_named_has_no_mask():
    assert Masks({"a": SiteMask(None, None)}).get("b") is None


def test_a_factor_without_numbers_is_refused():
    with pytest.raises(ValueError, match="meta device"):
        constant_masks(torch.ones(2, 3, 4), torch.ones((), device="meta"), ConcatenatedAxis({"a": 4}))
