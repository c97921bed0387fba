"""What is refused when attaching, by name and with the remedy; and what passes."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.tiny import decomposition_of, some_tokens, tiny_model
from tl_vpd.adapters import Unsupported


def test_quantised_weights_and_several_devices_are_refused_on_attach_and_at_the_next_pass(vpd):
    for flag, value in (("load_in_4bit", True), ("n_devices", 2)):
        model = tiny_model()
        with vpd.attach(model):
            setattr(model.cfg, flag, value)
            for call in (model, model.run_with_hooks):
                with pytest.raises(Unsupported, match=rf"cfg\.{flag} is"):
                    call(some_tokens())
        with pytest.raises(Unsupported, match=rf"cfg\.{flag} is"):
            vpd.attach(model)


def test_hook_mlp_in_is_supported(model, vpd, tokens):
    clean = model(tokens)
    model.set_use_hook_mlp_in(True)
    with vpd.attach(model) as attached, attached.masked("unmasked", delta=1.0):
        assert torch.equal(model(tokens), clean)


def test_another_models_decomposition_is_refused_with_the_size_of_the_mismatch(vpd):
    other = tiny_model(seed=1)
    with pytest.raises(
        ValueError, match=r"12 of 12 sites differ, blocks\.\d\..* by \d.*\(allowed 0\.02\).*check_weights=False"
    ):
        vpd.attach(other)
    with vpd.attach(other, check_weights=False) as attached, attached.masked("unmasked", delta=1.0):
        assert torch.equal(other(some_tokens()), tiny_model(seed=1)(some_tokens()))


def test_one_changed_weight_is_named(model, vpd):
    with torch.no_grad():
        model.blocks[1].mlp.W_out[0] += 1.0
    with pytest.raises(ValueError, match=r"1 of 12 sites differ, blocks\.1\.mlp\.W_out by"):
        vpd.attach(model)


@pytest.mark.parametrize(
    "processing", [dict(fold_ln=True), dict(center_writing_weights=True), dict(fold_value_biases=True)]
)
def test_a_copy_with_processed_weights_is_refused_where_they_differ(processing):
    plain = tiny_model(dtype=torch.float32)
    vpd, other = decomposition_of(plain), tiny_model(dtype=torch.float32)
    settings = dict(fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False)
    other.load_and_process_state_dict(copy.deepcopy(plain.state_dict()), **{**settings, **processing})
    if "fold_value_biases" in processing:  # touches biases alone, so the decomposition fits
        vpd.attach(other).detach()
        return
    flag = next(iter(processing))
    with pytest.raises(
        ValueError, match=rf"sites differ.*made with {flag}=False, this model has {flag}=True.*Load the model with"
    ):
        vpd.attach(other)


def test_a_copy_in_another_precision_passes(vpd, tokens):
    for dtype in (torch.float32, torch.bfloat16):
        other = tiny_model().to(dtype)
        with vpd.attach(other):
            _, cache = other.run_with_cache(tokens)
        assert cache["q_component_acts", 0].dtype == dtype
        assert cache["q_ci", 0].dtype == torch.float64  # Γ keeps its precision
        assert {p.dtype for p in vpd.parameters()} == {torch.float64}


def test_another_shape_is_refused_by_name(vpd):
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.W_in is 8x16 in this model and 8x12 in the decomposition"):
        vpd.attach(tiny_model(d_mlp=16))
    with pytest.raises(ValueError, match=r"This model has no blocks\.1\.attn\.W_Q.*of another model"):
        vpd.attach(tiny_model(n_layers=1))
    with pytest.raises(TypeError, match="A Linear cannot be decomposed"):
        vpd.attach(torch.nn.Linear(2, 2))


def test_near_misses_are_suggested(model, vpd):
    with pytest.raises(KeyError, match=r"'component_act' is not a kind of hook \(did you mean 'component_acts'\?\)"):
        vpd.attach(model, hooks=["component_act"])
    with pytest.raises(
        KeyError, match=r"No site matches 'blocks\.0\.attn\.W_q' \(did you mean 'blocks\.0\.attn\.W_Q'\?\)"
    ):
        vpd.attach(model, sites=["blocks.0.attn.W_q"])
    with pytest.raises(KeyError, match="did you mean"):
        vpd.causal_importances(model, torch.tensor([[1, 2]]))["blocks.0.attn.W_q"]
    assert "hook_q_ci" not in model.blocks[0]._modules  # nothing stays behind after a refusal


def test_a_site_that_does_not_run_once_is_said_aloud(model, vpd, tokens):
    model.blocks[0].mlp.hook_pre.register_forward_pre_hook(lambda m, a: None)
    with vpd.attach(model):
        plain = model.blocks[0].mlp.forward
        model.blocks[0].mlp.forward = lambda x: plain(x) * 0 + (x @ torch.zeros(8, 8, dtype=x.dtype))
        model.blocks[0].mlp.hook_post.forward = lambda x: x
        skipped = model.blocks[0].forward
        model.blocks[0].forward = lambda x, **k: x
        with pytest.raises(
            RuntimeError,
            match=r"exactly once: blocks\.0\.attn\.W_Q 0 times, .*does not compute them",
        ):
            model(tokens)
        model.blocks[0].forward = skipped
        model(tokens)
