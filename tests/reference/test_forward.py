"""Γ, squashings and masked outputs in every mask mode, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.reference.conftest import MODULES, Reference, by_site, pack, pack_sources, read
from tl_vpd.evaluation.batch import ce_by_row
from tl_vpd.forward import MaskedModel
from tl_vpd.importance import lower_leaky, upper_leaky
from tl_vpd.losses import kl_divergence
from tl_vpd.masking import constant_masks, masks_from_sources


@pytest.mark.parametrize(("name", "squash"), [("lower", lower_leaky), ("upper", upper_leaky)])
def test_squashings_and_their_gradients(name, squash):
    grid = read("sigmoid_grid")
    for sign, key in ((1.0, "grad_gpos"), (-1.0, "grad_gneg")):
        x = grid["x"].clone().requires_grad_()
        y = squash(x)
        y.backward(torch.full_like(y, sign))
        assert_close(y.detach(), grid[f"{name}/y"], rtol=0, atol=1e-7)
        assert_close(x.grad, grid[f"{name}/{key}"], rtol=0, atol=1e-7)


def test_clean_pass(reference: Reference):
    with MaskedModel(reference.decomposition, reference.model) as masked_model:
        logits, inputs = masked_model.clean(reference.tokens)
    assert_close(logits, reference.outputs["logits_clean"], rtol=0, atol=2e-5)
    for name, expected in by_site(reference.outputs, "act_in").items():
        assert_close(inputs[name], expected, rtol=0, atol=1e-5)
        acts = inputs[name] @ reference.decomposition.V[name].detach()
        assert_close(acts, by_site(reference.outputs, "comp_act")[name], rtol=0, atol=2e-5)


def test_deltas(reference: Reference):
    with MaskedModel(reference.decomposition, reference.model) as masked_model:
        for name, expected in by_site(reference.outputs, "weight_delta").items():
            delta = reference.decomposition.components.delta(name, masked_model.adapter.weight(name))
            assert_close(delta.detach().T, expected, rtol=0, atol=1e-6)


def test_importances(reference: Reference):
    with MaskedModel(reference.decomposition, reference.model) as masked_model, torch.no_grad():
        z = reference.decomposition.pre_sigmoid(masked_model.clean(reference.tokens)[1])
    assert_close(z, pack(reference.outputs, "ci_pre"), rtol=0, atol=1e-5)
    assert_close(lower_leaky(z), pack(reference.outputs, "ci_lower"), rtol=0, atol=1e-5)
    assert_close(upper_leaky(z), pack(reference.outputs, "ci_upper"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "case",
    [
        "a_ones_delta1",
        "b_ones_delta0",
        "c_ci_delta0",
        "d_stoch_allrouted",
        "e_stoch_routed",
        "f_ppgd_allrouted",
        "g_rounded_ci_delta0",
        "h_zero_delta0",
    ],
)
def test_masked_logits(reference: Reference, case: str, dtype: torch.dtype):
    site_axis, inputs = reference.site_axis, reference.inputs
    g = pack(reference.outputs, "ci_lower")
    stochastic = torch.cat(
        [pack(inputs, "src"), *(by_site(inputs, "src_delta")[n][..., None] for n in site_axis.names)], -1
    )
    routing = by_site(inputs, "routing")
    masks = {
        "a": lambda: constant_masks(torch.ones_like(g), 1.0, site_axis),
        "b": lambda: constant_masks(torch.ones_like(g), 0.0, site_axis),
        "c": lambda: constant_masks(g, 0.0, site_axis),
        "d": lambda: masks_from_sources(g, stochastic, site_axis),
        "e": lambda: masks_from_sources(g, stochastic, site_axis, routing),
        "f": lambda: masks_from_sources(g, pack_sources(inputs, "ppgd_src"), site_axis),
        "g": lambda: constant_masks((g > 0).to(g.dtype), 0.0, site_axis),
        "h": lambda: constant_masks(torch.zeros_like(g), 0.0, site_axis),
    }[case[0]]()
    if dtype == torch.float64:
        reference.model.to(torch.float64)
        reference.decomposition.to(torch.float64)
    with MaskedModel(reference.decomposition, reference.model) as masked_model, torch.no_grad():
        logits = masked_model.masked(reference.tokens, masks)
        target, _ = masked_model.clean(reference.tokens)
    assert_close(logits, reference.outputs[f"logits_{case}"].to(dtype), rtol=0, atol=5e-5)
    kl = kl_divergence(target.log_softmax(-1), logits)
    assert_close(kl.float(), torch.tensor(reference.scalars[f"kl_{case}"]), rtol=1e-5, atol=2e-6)
    ce = ce_by_row(logits, reference.tokens, None).mean
    assert ce == pytest.approx(float(reference.scalars[f"ce_{case}"]), rel=1e-5, abs=2e-6)


def test_l0(reference: Reference):
    for module, site in MODULES.items():
        l0 = (by_site(reference.outputs, "ci_lower")[site] > 0).sum(-1).float().mean()
        assert_close(l0, torch.tensor(reference.scalars[f"l0/{module}"]), rtol=1e-6, atol=0)
