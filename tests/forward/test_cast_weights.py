"""V and U in the model's precision: gradients come home, and a change of V or U is seen at once."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.tiny import decomposition_of, draw, tiny_model
from tl_vpd.forward import MaskedModel
from tl_vpd.forward.cast_weights import CastWeights
from tl_vpd.masking import Masks, SiteMask

IN = "blocks.1.mlp.W_in"
DTYPES = [torch.float64, torch.bfloat16]


def masks_of(vpd):
    return Masks({n: SiteMask(draw(6, seed=i), torch.tensor(0.5)) for i, n in enumerate(vpd.sites)})


@pytest.fixture(params=DTYPES, ids=str)
def case(request, tokens):
    """A model in another precision than its float32 decomposition."""
    model = tiny_model(dtype=request.param)
    return model, decomposition_of(model), tokens


def test_gradients_reach_the_users_own_parts_in_their_own_precision(case):
    model, vpd, tokens = case
    with vpd.attach(model) as attached, attached.masked(masks_of(vpd)):
        model(tokens).float().square().mean().backward()
    for part in (vpd.V, vpd.U):
        for p in part.values():
            assert p.grad is not None and p.grad.dtype == torch.float32 and bool((p.grad != 0).any())
    assert all(p.dtype == torch.float32 for p in vpd.parameters())


def test_those_gradients_are_a_float64_decompositions(tokens):
    model = tiny_model()
    single, double = decomposition_of(model), decomposition_of(model).double()
    results = []
    for vpd in (single, double):
        with vpd.attach(model) as attached, attached.masked(masks_of(double)):
            model(tokens).square().mean().backward()
        results.append([vpd.V[IN].grad.double(), vpd.U[IN].grad.double()])
    for a, b in zip(*results, strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_gradients_reach_v_through_cached_activations_and_patches(case):
    model, vpd, tokens = case
    recorded = {}
    with vpd.attach(model):
        look = ("blocks.1.hook_in_component_acts", lambda a, hook: recorded.update(a=a))
        model.run_with_hooks(tokens, fwd_hooks=[look])
        (gradient,) = torch.autograd.grad(recorded["a"].float().sum(), vpd.V[IN])
        x = {}
        with torch.no_grad(), MaskedModel(vpd, model) as masked_model:
            x = masked_model.clean(tokens)[1][IN]
    expected = x.float().sum((0, 1))[:, None].expand(8, 6)
    tolerance = {torch.float64: 1e-5, torch.bfloat16: 0.15}[model.cfg.dtype]
    assert_close(gradient, expected, rtol=tolerance, atol=tolerance)


def change_in_place(vpd):
    with torch.no_grad():
        vpd.U[IN].mul_(-2)


def change_by_index(vpd):
    with torch.no_grad():
        vpd.U[IN][3] = 7.0


def step(vpd):
    vpd.U[IN].grad = torch.ones_like(vpd.U[IN])
    torch.optim.SGD([vpd.U[IN]], lr=1.0).step()


def step_foreach(vpd):
    vpd.U[IN].grad = torch.ones_like(vpd.U[IN])
    torch.optim.AdamW([vpd.U[IN], vpd.V[IN]], lr=0.5, foreach=True).step()


def load(vpd):
    state = {k: v.clone() for k, v in vpd.state_dict().items()}
    key = next(k for k, p in vpd.named_parameters() if p is vpd.U[IN])
    state[key] *= 3
    vpd.load_state_dict(state)


def swap(vpd):
    vpd.U[IN].data = vpd.U[IN].data * 2 + 1


@pytest.mark.parametrize("change", [change_in_place, change_by_index, step, step_foreach, load, swap])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_changed_part_is_seen_at_the_next_pass(tokens, change, context):
    model = tiny_model(dtype=torch.bfloat16)
    vpd = decomposition_of(model)
    with vpd.attach(model) as attached, attached.masked("unmasked", sites=IN), MaskedModel(vpd, model) as masked_model:
        with context():
            before = model(tokens.clone())
        change(vpd)
        with context():
            after = model(tokens.clone())
            masks = Masks({IN: SiteMask(torch.ones(2, 7, 6), torch.zeros(2, 7))})
            in_tapped = masked_model.masked(tokens.clone(), masks)
    with context(), vpd.attach(model) as attached, attached.masked("unmasked", sites=IN):  # with separate casts
        expected = model(tokens.clone())
    assert torch.equal(after, expected) and not torch.equal(after, before)
    assert_close(in_tapped, expected, rtol=1e-2, atol=1e-2)


def test_after_inference_mode_gradients_are_there_again(case):
    model, vpd, tokens = case
    with vpd.attach(model) as attached, attached.masked(masks_of(vpd)):
        with torch.inference_mode():
            first = model(tokens.clone())
        with torch.no_grad():
            assert torch.equal(model(tokens), first)
        model(tokens).float().sum().backward()
        assert vpd.V[IN].grad is not None
        with torch.inference_mode():
            assert torch.equal(model(tokens.clone()), first)
    frozen = decomposition_of(model).requires_grad_(False)
    with frozen.attach(model) as attached:
        with torch.inference_mode(), attached.masked(masks_of(vpd)):
            model(tokens.clone())
        mask = torch.full((6,), 0.5, requires_grad=True)
        with attached.masked(Masks({IN: SiteMask(mask, None)})):
            model(tokens).float().square().sum().backward()
    assert bool((mask.grad != 0).any())


def test_a_decomposition_attached_under_inference_mode_serves_gradients_later(case):
    model, vpd, tokens = case
    with torch.inference_mode():
        attached = vpd.attach(model)
        with attached.masked("rounded"):
            model(tokens.clone())
    with attached, attached.masked(masks_of(vpd)):
        model(tokens).float().sum().backward()
    assert vpd.V[IN].grad is not None


def test_one_that_was_made_under_inference_mode_can_be_used(case):
    model, _, tokens = case
    with torch.inference_mode():
        vpd = decomposition_of(model)
    with torch.no_grad(), vpd.attach(model) as attached, attached.masked("zero"):
        assert bool(model(tokens).isfinite().all())


def test_constant_weights_collect_no_gradient_and_their_casts_are_reused(case):
    model, vpd, _ = case
    weights = CastWeights(vpd, torch.device("cpu"), model.cfg.dtype)
    assert weights.V[IN].requires_grad and weights.V[IN].dtype == model.cfg.dtype
    once = weights.V.constant(IN)
    assert not once.requires_grad and weights.V.constant(IN) is once
    assert weights.V[IN].requires_grad
    with torch.no_grad():
        assert weights.V[IN] is once and torch.equal(once, vpd.V[IN].to(model.cfg.dtype))
    same = CastWeights(vpd.to(model.cfg.dtype), torch.device("cpu"), model.cfg.dtype)
    assert same.V[IN] is vpd.V[IN] and list(same.V) == list(vpd.sites) and len(same.U) == 12
    assert not same.V.constant(IN).requires_grad and same.V.constant(IN).data_ptr() == vpd.V[IN].data_ptr()
