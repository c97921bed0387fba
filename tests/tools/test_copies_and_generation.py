"""``generate``, ``deepcopy``, ``to`` and ``torch.compile`` on attached and on masked models of each class."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from tests.tiny import options_of
from tests.tools.conftest import case_of
from tests.tools.models import KINDS
from tests.tools.models import tokens as some_tokens
from tl_vpd.masking import SiteMask

TIGHT = dict(rtol=1e-9, atol=1e-10)


def continued(model, prompt, **options):
    """Four greedy tokens after the prompt."""
    if model.tokenizer is None and "hooked_transformer" in KINDS:
        # TransformerLens 2 generates with none, but asks for one.
        model.tokenizer = SimpleNamespace(padding_side="right", pad_token_id=-1, eos_token_id=None, bos_token_id=0)
    settings = dict(max_new_tokens=4, do_sample=False, stop_at_eos=False, verbose=False, return_type="tokens")
    with torch.no_grad():
        return model.generate(prompt, **{**settings, **options})


WITH_KV_CACHE = [kind for kind in KINDS if kind != "native_bridge"]
"""A native bridge computes the whole prefix at every step, whatever ``use_past_kv_cache`` says."""
PROMPTS = [some_tokens(seed=seed, shape=(1, 5)) for seed in range(6)]


@pytest.mark.parametrize("use_past_kv_cache", [True, False])
def test_generation_is_the_plain_models_when_attached_and_an_edited_models_when_masked(case, use_past_kv_cache):
    plain = case.fresh()
    different = 0
    for prompt in PROMPTS:
        expected = continued(plain, prompt, use_past_kv_cache=use_past_kv_cache)
        edited = continued(case.twin, prompt, use_past_kv_cache=use_past_kv_cache)
        with case.vpd.attach(case.model) as attached:
            assert torch.equal(continued(case.model, prompt, use_past_kv_cache=use_past_kv_cache), expected)
            with attached.masked(case.masks):
                got = continued(case.model, prompt, use_past_kv_cache=use_past_kv_cache)
        assert torch.equal(got, edited)
        different += not torch.equal(got, expected)
    assert different


@pytest.mark.parametrize("mode", ["rounded", "ci", "stochastic", "adversarial"])
@pytest.mark.parametrize("kind", WITH_KV_CACHE)
def test_modes_that_need_importances_generate_with_and_without_a_kv_cache(kind, mode):
    case, prompt = case_of(kind), PROMPTS[0]
    with case.vpd.attach(case.model) as attached, attached.masked(mode, **options_of(mode, seed=0, steps=2)):
        cached, whole = (continued(case.model, prompt, use_past_kv_cache=use) for use in (True, False))
    assert cached.shape == whole.shape == (1, 9)
    if mode in ("rounded", "ci"):
        assert torch.equal(cached, whole)


def test_rounded_generation_picks_what_the_rounded_model_predicts(case):
    prompt = PROMPTS[1]
    with case.vpd.attach(case.model) as attached, attached.masked("rounded"), torch.no_grad():
        text = continued(case.model, prompt, use_past_kv_cache=False)
        for at in range(prompt.shape[1], text.shape[1]):
            assert int(case.model(text[:, :at])[0, -1].argmax()) == int(text[0, at])


@pytest.mark.parametrize("kind", WITH_KV_CACHE)
def test_masks_from_a_function_follow_generation_with_a_kv_cache(kind):
    """One position comes at a time; a function of site and activations masks each alike."""
    case, recorded = case_of(kind), set()

    def fixed(site, acts):
        recorded.add(acts.shape[1])
        site_mask = case.masks[site]
        return SiteMask(site_mask.mask, site_mask.delta)

    with case.vpd.attach(case.model) as attached, attached.masked(fixed):
        got = continued(case.model, PROMPTS[2], use_past_kv_cache=True)
    assert torch.equal(got, continued(case.twin, PROMPTS[2], use_past_kv_cache=True))
    assert recorded == {5, 1}


def test_a_deep_copy_is_the_clean_model_and_is_masked_when_attached_itself(case):
    model, tokens = case.model, case.tokens
    with (
        torch.no_grad()
    ):  # a bridge of fused Q, K and V keeps what its last pass with gradients made, which cannot be copied
        clean = model(tokens)
    with case.vpd.attach(model) as attached:
        with attached.masked(case.masks):
            other = copy.deepcopy(model)
        assert torch.equal(other(tokens), clean)
        with attached.masked("zero"):
            assert torch.equal(other(tokens), clean)
        with case.vpd.attach(other) as second, second.masked(case.masks):
            assert_close(other(tokens), case.twin(tokens), **TIGHT)
            assert torch.equal(model(tokens), clean)
    assert "blocks.0.hook_q_component_acts" not in {**other.hook_dict, **model.hook_dict}


def test_casting_an_attached_model_masks_in_the_new_dtype(case):
    tokens = case.tokens
    with case.vpd.attach(case.model) as attached:
        case.model.to(torch.float32)
        plain = case.fresh().to(torch.float32)
        assert torch.equal(case.model(tokens), plain(tokens))
        with attached.masked(case.masks):
            masked = case.model(tokens)
            assert masked.dtype == torch.float32
            assert_close(masked, case.twin.to(torch.float32)(tokens), rtol=1e-4, atol=1e-4)
        case.model.to("cpu")
        assert torch.equal(case.model(tokens), plain(tokens))
    assert next(case.vpd.parameters()).dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_model_agrees_with_itself_idle_and_masked(kind):
    command = [sys.executable, "-m", "tests.tools.compiled", kind]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
