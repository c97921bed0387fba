"""With every mask and Δ's at 1 the attached model is itself to the bit, whatever its architecture and dtype."""

from __future__ import annotations

import pytest
import torch
from transformer_lens import HookedTransformer

from tests.tiny import ARCHITECTURES, decomposition_of, some_tokens, tiny_model
from tl_vpd.hooks.attached import KINDS
from tl_vpd.masking import Masks, SiteMask


def ones(vpd, shape=(2, 7), dtype=torch.float64) -> Masks:
    return Masks(
        {n: SiteMask(torch.ones(*shape, c, dtype=dtype), torch.ones(shape, dtype=dtype)) for n, c in vpd.counts.items()}
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_ones_listeners_and_rest_change_no_bit(name):
    model = tiny_model(**ARCHITECTURES[name])
    vpd, tokens = decomposition_of(model), some_tokens()
    clean, plain_cache = model.run_with_cache(tokens)
    with vpd.attach(model) as attached:
        assert torch.equal(model(tokens), clean)
        logits, cache = model.run_with_cache(tokens)
        assert torch.equal(logits, clean)
        assert all(torch.equal(cache[k], plain_cache[k]) for k in plain_cache)
        assert set(cache) - set(plain_cache) == {s.hook_name(k) for s in vpd.sites.values() for k in KINDS}
        with attached.masked("unmasked", delta=1.0):
            assert torch.equal(model(tokens), clean)
        assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=vpd.mask_hooks(ones(vpd))), clean)
        with torch.no_grad(), attached.masked("unmasked", delta=1.0):
            assert torch.equal(model.run_with_cache(tokens)[0], clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["layernorm", "rms, gated, grouped", "no norm", "attention only"])
def test_ones_change_no_bit_in_low_precision(name, dtype):
    model = tiny_model(dtype=dtype, **ARCHITECTURES[name])
    vpd, tokens = decomposition_of(model), some_tokens()
    clean = model(tokens)
    assert clean.dtype == dtype
    with vpd.attach(model) as attached:
        logits, cache = model.run_with_cache(tokens)
        assert torch.equal(logits, clean) and cache["q_component_acts", 1].dtype == dtype
        with attached.masked("unmasked", delta=1.0):
            assert torch.equal(model(tokens), clean)
        with attached.masked(ones(vpd)):  # masks in another dtype than the model's
            assert torch.equal(model(tokens), clean)


def test_the_loss_and_other_return_types_are_the_models(model: HookedTransformer, vpd, tokens):
    loss, both = model(tokens, return_type="loss"), model(tokens, return_type="both")
    with vpd.attach(model) as attached, attached.masked("unmasked", delta=1.0):
        assert torch.equal(model(tokens, return_type="loss"), loss)
        assert torch.equal(model(tokens, return_type="both").loss, both.loss)
        assert model(tokens, return_type=None) is None
        residual = model(tokens, stop_at_layer=1)
        assert torch.equal(model(residual, start_at_layer=1), both.logits)


def test_under_inference_mode_nothing_changes_either(model, vpd, tokens):
    clean = model(tokens)
    with torch.inference_mode(), vpd.attach(model) as attached:
        assert torch.equal(model.run_with_cache(tokens)[0], clean)
        with attached.masked("unmasked", delta=1.0):
            assert torch.equal(model(tokens), clean)


def test_gradients_of_weights_are_the_models_own(model, vpd, tokens):
    def gradients():
        return [g.clone() for g in torch.autograd.grad(model(tokens, return_type="loss"), list(model.parameters()))]

    expected = gradients()
    with vpd.attach(model) as attached:
        assert all(torch.equal(a, b) for a, b in zip(gradients(), expected, strict=True))
        with attached.masked("unmasked", delta=1.0):
            for a, b in zip(gradients(), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
