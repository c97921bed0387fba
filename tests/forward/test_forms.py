"""Both forms of the masked product against the definition: outputs and every gradient, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from tests.forward.chain import AXIS, BATCH, POOL, POS, SHAPES, TOKENS, chain, leaves, of_pass, routing_of
from tests.tiny import draw
from tl_vpd.forward import BlockedMasks, MaskInputs, TraceableMasks, masked_output
from tl_vpd.forward import blocked as blocked_module
from tl_vpd.forward.slots import Slots, assign_slots
from tl_vpd.masking import masks_from_sources
from tl_vpd.masking.masks import mask_of


def definition(t, routing, source_rows):
    """``masked_output`` with masks as tensors."""
    sources = t["sources"] if source_rows is None else t["sources"][source_rows]
    masks = masks_from_sources(t["g"], sources.view(BATCH, POS, -1), AXIS, routing)

    def product(name, y, x):
        m = masks[name]
        acts, U, b = x @ t[f"V{name}"], t[f"U{name}"], t.get(f"b{name}")
        return masked_output(y, acts, U, b, mask=m.mask, delta_mask=m.delta, routed=m.routed)

    return product


def blocked(t, routing, source_rows):
    """``BlockedMasks`` leave the gradients of g and of the sources where those of the leaves are."""
    t["g"].grad, t["sources"].grad = torch.zeros_like(t["g"]), torch.zeros_like(t["sources"])
    gradients = {"grad_g": t["g"].grad, "grad_sources": t["sources"].grad}
    return BlockedMasks(t["g"], MaskInputs(t["sources"], source_rows, routing), AXIS, **gradients)


def traceable(t, routing, source_rows):
    """``TraceableMasks``, in slots where tokens are routed."""
    sources = t["sources"] if source_rows is None else t["sources"][source_rows]
    if routing is None:
        return TraceableMasks.from_sources(t["g"], sources.view(BATCH, POS, -1), AXIS)
    stacked = assign_slots(torch.stack([routed.flatten() for routed in routing.values()]), TOKENS - 1)
    slots = {name: Slots(*(tensor[i] for tensor in stacked)) for i, name in enumerate(SHAPES)}
    g, delta_at = t["g"].flatten(0, 1), AXIS.total
    masks = {
        n: mask_of(slots[n].gathered(g[:, at]), slots[n].gathered(sources[:, at])) for n, at in AXIS.slices.items()
    }
    deltas = {n: slots[n].gathered(sources[:, delta_at + i : delta_at + i + 1]) for i, n in enumerate(SHAPES)}
    return TraceableMasks(masks, deltas, torch.Size([BATCH, POS]), slots)


FORMS = {"blocked": blocked, "traceable": traceable}


@settings(deadline=None, max_examples=20)
@pytest.mark.parametrize("form", FORMS)
@given(
    pooled=st.booleans(),
    bias=st.booleans(),
    share=st.sampled_from([None, 0.0, 0.5, 0.9]),
    block=st.sampled_from([8, 1 << 17]),
    seed=st.integers(0, 1000),
)
def test_outputs_and_all_gradients_are_those_of_the_definition(form, pooled, bias, share, block, seed):
    routing = None if share is None else routing_of(share, seed)
    source_rows = (draw(TOKENS, seed=seed + 70) * POOL).long() if pooled else None
    one, other = leaves(pooled, bias, seed), leaves(pooled, bias, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked_module, "BLOCK", block)
        value = chain(one, of_pass(FORMS[form](one, routing, source_rows), one))
        value.backward()
    expected = chain(other, definition(other, routing, source_rows))
    expected.backward()
    assert_close(value, expected, rtol=1e-12, atol=1e-12)
    for name, tensor in one.items():
        if tensor.requires_grad:
            true = torch.zeros_like(tensor) if other[name].grad is None else other[name].grad
            assert_close(tensor.grad, true, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("routed", [False, True])
def test_whole_masks_and_their_gradients_are_those_of_the_definition(form, routed):
    routing = routing_of(0.5, seed=0) if routed else None
    one, other = leaves(False, False, seed=0), leaves(False, False, seed=0)
    weights, delta_weights = draw(BATCH, POS, 3, seed=80), draw(BATCH, POS, seed=81)
    at = torch.ones(BATCH, POS, dtype=torch.bool) if routing is None else routing["b"]
    expected = masks_from_sources(other["g"], other["sources"].view(BATCH, POS, -1), AXIS)["b"]
    for mask, delta in (FORMS[form](one, routing, None).mask("b"), (expected.mask, expected.delta)):
        assert_close(mask[at], expected.mask[at], rtol=1e-12, atol=1e-12)
        assert_close(delta[at], expected.delta[at], rtol=1e-12, atol=1e-12)
        # Values at tokens that are not routed mean nothing, and nothing may come of them.
        ((mask * weights)[at].sum() + (delta * delta_weights)[at].sum()).backward()
    for name in ("g", "sources"):
        assert_close(one[name].grad, other[name].grad, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_outputs_in_lower_precision_are_the_definitions_to_its_rounding(form, dtype):
    t = {name: tensor.detach().to(torch.float32) for name, tensor in leaves(False, True, seed=0).items()}
    x, y = t["x"].to(dtype), (t["x"] @ t["Wa"] + t["ba"]).to(dtype)
    product = of_pass(FORMS[form](t, None, None), t)
    expected = definition({n: tensor.double() for n, tensor in t.items()}, None, None)("a", y.double(), x.double())
    output = product("a", y, x)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert output.dtype == dtype
    assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)
