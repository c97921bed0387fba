"""Taps without HookPoints: clean and masked passes that neither see nor disturb what users left on the model."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.hooks.snapshots import assert_same, snapshot
from tests.tiny import decomposition_of, draw, tiny_model
from tl_vpd.adapters import adapt
from tl_vpd.forward import MaskedModel
from tl_vpd.forward.quiet import frozen, users_hooks_aside
from tl_vpd.masking import Masks, SiteMask


def test_entering_and_leaving_changes_nothing(model, vpd, tokens):
    model(tokens, return_type="loss").backward()
    model.add_hook("hook_embed", lambda x, hook: x * 2)
    model.blocks[0].attn.W_Q.requires_grad_(False)
    model.blocks[1].eval()
    before = snapshot(model)
    with MaskedModel(vpd, model) as masked_model:
        masked_model.clean(tokens)
    assert_same(before, snapshot(model))
    with pytest.raises(ZeroDivisionError), MaskedModel(vpd, model):
        raise ZeroDivisionError
    assert_same(before, snapshot(model))


def test_the_clean_pass_is_the_targets_without_transient_hooks_and_with_permanent_ones(model, vpd, tokens):
    model.add_perma_hook("blocks.0.hook_resid_post", lambda x, hook: x * 0.5)
    expected = model(tokens).detach()
    model.add_hook("hook_embed", lambda x, hook: x * 2)
    with MaskedModel(vpd, model) as masked_model:
        logits, inputs = masked_model.clean(tokens)
    assert torch.equal(logits, expected) and not logits.requires_grad
    assert {n: x.shape for n, x in inputs.items()} == {n: (2, 7, s.d_in) for n, s in vpd.sites.items()}


def test_it_is_clean_inside_masked_contexts_and_from_inside_a_hook(model, vpd, tokens):
    expected = vpd.causal_importances(model, tokens).concatenated
    results = []
    with vpd.attach(model) as attached:
        clean = model(tokens)
        for mode in ("zero", "rounded"):
            with attached.masked(mode), torch.no_grad():
                assert torch.equal(vpd.causal_importances(model, tokens).concatenated, expected)
                masked = model(tokens)
                look = (
                    "blocks.1.hook_resid_pre",
                    lambda x, hook: results.append(vpd.causal_importances(model, tokens).concatenated),
                )
                assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=[look]), masked)
                assert torch.equal(results.pop(), expected)
        assert torch.equal(model(tokens), clean)


def test_gradients_reach_masks_and_parts_but_not_the_target(model, vpd, tokens):
    site = "blocks.0.attn.W_O"
    mask = draw(2, 7, 6).requires_grad_()
    with MaskedModel(vpd, model) as masked_model:
        masked_model.masked(tokens, Masks({site: SiteMask(mask, None)})).sum().backward()
        assert mask.grad is not None and vpd.V[site].grad is not None and vpd.U[site].grad is not None
        assert all(p.grad is None for p in model.parameters())
        expected, before = mask.grad.clone(), vpd.V[site].grad.clone()
        mask.grad = None
        masked_model.masked(tokens, Masks({site: SiteMask(mask, None)}), constant_weights=True).sum().backward()
        assert_close(mask.grad, expected)
        assert torch.equal(vpd.V[site].grad, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_float32_decomposition_runs_on_a_model_of_another_precision(tokens, dtype):
    model = tiny_model(dtype=dtype)
    vpd = decomposition_of(model)
    masks = Masks({n: SiteMask(torch.ones(2, 7, 6), torch.ones(2, 7)) for n in vpd.sites})
    with MaskedModel(vpd, model) as masked_model:
        logits, _ = masked_model.clean(tokens)
        masked = masked_model.masked(tokens, masks)
        assert masked.dtype == dtype and torch.equal(masked, logits)
        masked.float().sum().backward()
    assert all(v.grad is not None and v.grad.dtype == torch.float32 for v in vpd.V.values())


def test_frozen_and_hooks_aside_put_everything_back_after_an_exception(model):
    model.add_hook("hook_embed", lambda x, hook: x)
    model.blocks[0].eval()
    before, dictionary = snapshot(model), model.hook_embed._forward_hooks
    with pytest.raises(ZeroDivisionError), frozen(adapt(model)), users_hooks_aside(adapt(model)):
        assert not any(p.requires_grad for p in model.parameters()) and not any(m.training for m in model.modules())
        assert not model.hook_embed._forward_hooks
        raise ZeroDivisionError
    assert_same(before, snapshot(model))
    assert model.hook_embed._forward_hooks is dictionary


def test_a_model_without_the_sites_is_refused_and_left_as_it_was(vpd, tokens):
    other = tiny_model(n_layers=1)
    other.add_hook("hook_embed", lambda x, hook: x * 2)
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"This model has no blocks\.1\.attn\.W_Q.*of another model"):
        vpd.causal_importances(other, tokens)
    assert_same(before, snapshot(other))


def test_a_tap_that_cannot_be_put_on_leaves_the_model_as_it_was(model, vpd, monkeypatch):
    before, masked_model = snapshot(model), MaskedModel(vpd, model)
    tap, put = masked_model.adapter.tap, []

    def failing(name, *arguments):
        if len(put) == 3:
            raise ZeroDivisionError
        put.append(name)
        return tap(name, *arguments)

    monkeypatch.setattr(masked_model.adapter, "tap", failing)
    with pytest.raises(ZeroDivisionError), masked_model:
        pass
    assert_same(before, snapshot(model))
