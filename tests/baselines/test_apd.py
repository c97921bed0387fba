"""APD's equations by hand and against autograd, and a short run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call, jacrev
from torch.testing import assert_close

from tests.adapters.custom_models import normal, two_layers
from tl_vpd.adapters import adapt
from tl_vpd.baselines import APDConfig, apd
from tl_vpd.baselines.apd_losses import attributions, batch_top_k, schatten, simplicity, unfaithfulness
from tl_vpd.baselines.components import FullComponents, output_gradients
from tl_vpd.toys import TMS, train

SHAPES = {"fc": (4, 6), "head.out": (6, 3)}


def test_attributions_are_root_mean_squares_of_the_outputs_slopes_along_each_component():
    model, parts = two_layers(), FullComponents(SHAPES, C=3, seed=1).double()
    x = normal(2, 2, 4)
    _, inputs, gradients = output_gradients(adapt(model), list(SHAPES), x)
    result = attributions(parts, inputs, gradients)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    for row in range(2):
        for pos in range(2):
            slopes = jacrev(lambda w, at=x[row, pos]: functional_call(model, w, (at,)))(weights)
            for c in range(3):
                along = sum(
                    torch.einsum("o j i, i j -> o", slopes[f"{site}.weight"], parts.matrices(site)[c].detach())
                    for site in SHAPES
                )
                assert_close(result[row, pos, c].detach(), along.square().mean().sqrt())


def test_the_largest_of_a_batch_are_selected():
    values = torch.tensor([[[3.0, 0.0, 2.0]], [[1.0, 5.0, 0.5]]])
    assert batch_top_k(values, 1.0).tolist() == [[[True, False, False]], [[False, True, False]]]
    assert batch_top_k(values, 1.5).sum() == 3 and batch_top_k(values, 0.01).sum() == 1
    assert batch_top_k(values, 99.0).all()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 4), st.floats(0.5, 1.0), st.integers(0, 99))
def test_the_simplicity_is_the_schatten_norm_at_singular_factors_and_never_below_it(d_in, d_out, p, seed):
    parts = FullComponents({"a": (d_in, d_out)}, C=2, seed=seed).double()
    u, sigma, vh = torch.linalg.svd(parts.matrices("a").detach(), full_matrices=False)
    norms = sigma.pow(p).sum(-1)
    assert (schatten(parts, p) >= norms - 1e-6).all()
    with torch.no_grad():
        parts.A[0].copy_(u)
        parts.B[0].copy_(sigma[..., None] * vh)
    assert_close(schatten(parts, p).detach(), norms, atol=1e-5, rtol=1e-4)


def test_the_simplicity_loss_is_per_weight_and_input_and_counts_what_is_selected():
    parts = FullComponents({"a": (1, 2), "b": (2, 1)}, C=2)
    with torch.no_grad():
        for factor in (*parts.A, *parts.B):
            factor.fill_(1.0)
    # Each matrix is of rank one with entries of 1: its Schatten 1-norm is √2, and an input's component has two of them.
    selected = torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]], [[0.0, 0.0]]])
    assert float(simplicity(parts, selected, 1.0).detach()) == pytest.approx(3 / 3 * 2 * 2**0.5 / 4)


def test_unfaithfulness_is_the_mean_squared_error_of_all_weights():
    parts = FullComponents({"a": (1, 2), "b": (2, 1)}, C=2)
    with torch.no_grad():
        for factor in (*parts.A, *parts.B):
            factor.fill_(1.0)
    weights = {"a": torch.tensor([[2.0, 5.0]]), "b": torch.zeros(2, 1)}
    assert float(unfaithfulness(parts, weights).detach()) == pytest.approx((0 + 9 + 4 + 4) / 4)


def test_a_short_run_on_tms_selects_components_that_carry_the_features():
    toy = TMS(5, 2)
    model = train(toy, 0, steps=300)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = APDConfig(steps=150, batch_size=2, C=6)
    result, again = (apd(model, toy.batches(2, seed=1), config) for _ in range(2))
    assert torch.equal(result.pieces("embed"), again.pieces("embed"))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    weights = {site: adapt(model).weight(site) for site in ("embed", "unembed")}
    assert float(unfaithfulness(result.components, weights).detach()) < 0.05 * float(weights["embed"].square().mean())
    x = toy.batches(16, seed=9).at(0)
    g = result.importances(x)
    assert g["embed"] is g["unembed"] and set(g["embed"].unique().tolist()) == {0.0, 1.0}
    on = (x > 0).any(-1)
    assert float(g["embed"].sum(-1)[on].mean()) > 5 * float(g["embed"].sum(-1)[~on].mean())
    assert result.output(x, g).shape == x.shape
    with torch.no_grad():
        error, of_zero = (
            (result.output(x, s) - model(x)).square().mean() for s in (g, {k: 0 * v for k, v in g.items()})
        )
    assert float(error) < 0.8 * float(of_zero)


def test_a_rate_that_is_far_too_high_is_said():
    toy = TMS(3, 2)
    with pytest.raises(FloatingPointError, match="Step 1: the loss is not finite; lower the learning rate"):
        apd(toy.build(), toy.batches(1), APDConfig(steps=20, batch_size=1, C=2, lr=1e30, warm_up=0.0))
