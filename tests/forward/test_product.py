"""The cheap form of the masked output against the explicit one, with Δ and V @ U formed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from tests.tiny import draw
from tl_vpd.forward import masked_output


class Case:
    """A random site with x, W, b, V, U in float64."""

    def __init__(self, seed: int, d_in: int, d_out: int, C: int, *, bias: bool = True, batch: tuple[int, ...] = (2, 3)):
        g = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.x, self.W = normal(*batch, d_in), normal(d_in, d_out)
        self.V, self.U = normal(d_in, C), normal(C, d_out)
        self.b = normal(d_out) if bias else None
        self.mask, self.delta = torch.rand(*batch, C, generator=g).double(), torch.rand(*batch, generator=g).double()
        self.routed = torch.rand(*batch, generator=g) < 0.5
        self.y = self.x @ self.W + (0 if self.b is None else self.b)
        self.acts = self.x @ self.V

    def explicit(self, mask, delta, acts=None):
        """((x V) ⊙ m) U + m_Δ x (W − V U) + b, every matrix formed."""
        acts = self.acts if acts is None else acts
        out = (acts * mask) @ self.U + delta[..., None] * (self.x @ (self.W - self.V @ self.U))
        return out + (0 if self.b is None else self.b)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    d_in=st.integers(1, 5),
    d_out=st.integers(1, 5),
    C=st.integers(1, 7),
    bias=st.booleans(),
    masked=st.booleans(),
    delta=st.booleans(),
    patched=st.booleans(),
    routed=st.booleans(),
)
def test_any_masks_give_the_explicit_formula(seed, d_in, d_out, C, bias, masked, delta, patched, routed):
    case = Case(seed, d_in, d_out, C, bias=bias)
    mask = case.mask if masked else torch.ones_like(case.mask)
    m_delta = case.delta if delta else torch.ones_like(case.delta)
    acts = case.acts.roll(1, 0) if patched else None
    expected = case.explicit(mask, m_delta, acts)
    if routed:
        expected = torch.where(case.routed[..., None], expected, case.y)
    out = masked_output(
        case.y,
        case.acts,
        case.U,
        case.b,
        mask=case.mask if masked else None,
        delta_mask=case.delta if delta else None,
        routed=case.routed if routed else None,
        patched_acts=acts,
    )
    assert_close(out, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_ones_give_the_output_itself_to_the_bit(dtype):
    case = Case(0, 16, 8, 24)
    y, acts, U, b = (t.to(dtype) for t in (case.y, case.acts, case.U, case.b))
    ones, one = torch.ones_like(acts), torch.ones_like(acts[..., 0])
    assert torch.equal(masked_output(y, acts, U, b), y)
    assert torch.equal(masked_output(y, acts, U, b, mask=ones, delta_mask=one), y)
    assert torch.equal(masked_output(y, acts, U, b, mask=ones, delta_mask=one, patched_acts=acts.clone()), y)


def test_patched_activations_act_even_where_masks_are_one():
    case = Case(1, 3, 4, 5)
    patched = case.acts.clone()
    patched[..., 2] += 1.5
    assert_close(masked_output(case.y, case.acts, case.U, case.b, patched_acts=patched), case.y + 1.5 * case.U[2])


def test_masks_are_broadcast_over_batch_and_position():
    case = Case(2, 3, 4, 5)
    mask, delta = draw(1, 1, 5), draw(1, 3)
    out = masked_output(case.y, case.acts, case.U, case.b, mask=mask, delta_mask=delta)
    assert_close(out, case.explicit(mask.expand(2, 3, 5), delta.expand(2, 3)), rtol=1e-10, atol=1e-10)


def test_gradients_reach_everything_and_are_those_of_finite_differences():
    case = Case(3, 3, 2, 4, batch=(1, 2))
    leaves = [t.clone().requires_grad_() for t in (case.x, case.W, case.b, case.V, case.U, case.mask, case.delta)]

    def output(x, W, b, V, U, mask, delta):
        return masked_output(x @ W + b, x @ V, U, b, mask=mask, delta_mask=delta)

    assert torch.autograd.gradcheck(output, leaves)


def test_the_output_is_used_up_only_where_it_may_be_and_nobody_wants_gradients():
    case = Case(3, 5, 4, 6)
    for grad, overwrite, delta, routed, used in [
        (False, True, None, None, True),
        (False, False, None, None, False),
        (True, True, None, None, False),
        (False, True, case.delta, None, False),
        (False, True, None, case.routed, False),
    ]:
        y = case.y.clone()
        with torch.set_grad_enabled(grad):
            out = masked_output(
                y, case.acts, case.U, case.b, mask=case.mask, delta_mask=delta, routed=routed, overwrite=overwrite
            )
        assert torch.equal(y, case.y) is not used and (out.data_ptr() == y.data_ptr()) is used
