"""Full components in a model: sums, masks, gradients."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from tests.adapters.custom_models import normal, two_layers
from tl_vpd.adapters import adapt
from tl_vpd.baselines.components import FullComponents, on_components, output_gradients

SHAPES = {"fc": (4, 6), "head.out": (6, 3)}


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_a_masked_product_is_that_with_the_masked_sum(C, d_in, d_out, seed):
    parts = FullComponents({"a": (d_in, d_out)}, C, seed=seed).double()
    x, s = normal(3, 2, d_in, seed=seed), normal(3, 2, C, seed=seed + 1)
    assert parts.matrices("a").shape == (C, d_in, d_out)
    summed = torch.einsum("r p c, c i o -> r p i o", s, parts.matrices("a"))
    assert_close(parts.masked("a", x, s), torch.einsum("r p i, r p i o -> r p o", x, summed))


def test_components_that_sum_to_the_weights_run_the_model_itself_and_leave_it_as_it_was():
    model, parts = two_layers(), FullComponents(SHAPES, C=1).double()
    adapter = adapt(model)
    with torch.no_grad():
        parts.A[0].copy_(torch.eye(4)[None])
        parts.B[0].copy_(adapter.weight("fc")[None])
        parts.A[1].copy_(adapter.weight("head.out")[None])
        parts.B[1].copy_(torch.eye(3)[None])
    x = normal(5, 2, 4)
    before = model(x)
    masks = {name: torch.ones(5, 2, 1, dtype=torch.float64) for name in SHAPES}
    with on_components(adapter, parts, masks):
        assert_close(model(x), before)
    with on_components(adapter, parts, {name: 0 * mask for name, mask in masks.items()}):
        assert_close(model(x), torch.zeros(5, 2, 3, dtype=torch.float64))
    assert torch.equal(model(x), before) and model.fc.weight.requires_grad


def test_gradients_of_every_output_are_those_of_a_jacobian():
    model = two_layers()
    x = normal(3, 2, 4)
    target, inputs, gradients = output_gradients(adapt(model), list(SHAPES), x)
    assert torch.equal(target, model(x).detach()) and torch.equal(inputs["fc"], x)

    def after_fc(y: torch.Tensor) -> torch.Tensor:
        return model.head.out(y.relu())

    for row in range(3):
        for pos in range(2):
            jacobian = torch.autograd.functional.jacobian(after_fc, model.fc(x[row, pos]))
            assert_close(gradients["fc"][:, row, pos], jacobian)
            assert_close(gradients["head.out"][:, row, pos], torch.eye(3, dtype=torch.float64))


def test_tied_sites_have_one_matrix_turned_round_that_learns_from_both():
    parts = FullComponents({"a": (4, 3), "middle": (3, 3), "b": (3, 4)}, C=2, tied=[("a", "b")]).double()
    assert torch.equal(parts.matrices("b"), parts.matrices("a").mT) and len(list(parts.parameters())) == 4
    x, s, w = normal(5, 3), normal(5, 2, seed=1), normal(5, 4, seed=2)
    expected = torch.einsum("r c, c i o -> r i o", s, parts.matrices("a"))
    assert_close(parts.masked("b", x, s), torch.einsum("r o, r i o -> r i", x, expected))
    (w * parts.masked("b", x, s)).sum().backward()
    through_b = parts.A[0].grad.clone()
    (x * parts.masked("a", w, s)).sum().backward()
    # x · Pᵀ · w is w · P · x: the same number, so the same gradient once more.
    assert_close(parts.A[0].grad, 2 * through_b)
