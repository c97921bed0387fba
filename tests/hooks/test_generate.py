"""Generation with and without a KV cache, masked and not."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import GAMMA, decomposition_of, options_of
from tl_vpd.masking.modes import NEED_IMPORTANCES


def generate(model, prompts, n=3, **more):
    return model.generate(prompts, max_new_tokens=n, do_sample=False, stop_at_eos=False, verbose=False, **more)


def greedy(model, tokens):
    """Three tokens by whole forward passes."""
    for _ in range(3):
        tokens = torch.cat([tokens, model(tokens)[:, -1].argmax(-1, keepdim=True)], dim=1)
    return tokens


@pytest.mark.parametrize("use_past_kv_cache", [True, False])
def test_an_idle_attached_model_generates_what_it_always_does(model, vpd, tokens, use_past_kv_cache):
    expected = generate(model, tokens, use_past_kv_cache=use_past_kv_cache)
    with vpd.attach(model):
        assert torch.equal(generate(model, tokens, use_past_kv_cache=use_past_kv_cache), expected)


def half(site, acts):
    return torch.full_like(acts, 0.5)


@pytest.mark.parametrize("mode", ["zero", "unmasked", half])
def test_masks_that_need_no_importances_work_with_a_kv_cache(model, vpd, tokens, mode):
    with torch.no_grad(), vpd.attach(model) as attached, attached.masked(mode):
        expected = greedy(model, tokens)
        assert torch.equal(generate(model, tokens, use_past_kv_cache=True), expected)
        assert torch.equal(generate(model, tokens, use_past_kv_cache=False), expected)


def test_ablations_everywhere_work_with_a_kv_cache(model, vpd, tokens):
    addresses = [f"{site}:{i}" for site in vpd.sites for i in range(6)]
    with torch.no_grad(), vpd.attach(model) as attached, attached.ablated(addresses):
        assert torch.equal(generate(model, tokens), greedy(model, tokens))


@pytest.fixture
def bidirectional(model):
    return decomposition_of(model, gamma=GAMMA | {"causal": False}).to(torch.float64)


@pytest.mark.parametrize("mode", NEED_IMPORTANCES)
def test_with_a_bidirectional_gamma_importances_need_the_whole_prefix(model, bidirectional, tokens, mode):
    with torch.no_grad(), bidirectional.attach(model) as attached:
        message = f"The mode '{mode}' needs the whole prefix.*use_past_kv_cache=False"
        with pytest.raises(ValueError, match=message), attached.masked(mode, **options_of(mode, steps=1, seed=0)):
            generate(model, tokens)
        with attached.masked(mode, **options_of(mode, steps=1, seed=0)):
            expected = greedy(model, tokens)
        with attached.masked(mode, **options_of(mode, steps=1, seed=0)):
            assert torch.equal(generate(model, tokens, use_past_kv_cache=False), expected)


def test_with_a_bidirectional_gamma_listening_to_importances_does_too(model, bidirectional, tokens):
    recorded = []
    with (
        bidirectional.attach(model),
        model.hooks(fwd_hooks=[("blocks.0.hook_q_ci", lambda g, hook: recorded.append(g.shape[1]))]),
    ):
        with pytest.raises(ValueError, match="hook_ci needs the whole prefix"):
            generate(model, tokens)
        generate(model, tokens, use_past_kv_cache=False)
    assert recorded == [7, 8, 9]


def test_masks_of_the_prompt_say_that_a_step_has_one_position(model, vpd, tokens):
    masks = vpd.causal_importances(model, tokens).masks("ci")
    message = r"is \(2, 7, 6\), this forward pass needs \(2, 1, 6\).*function \(site, acts\) -> mask"
    with vpd.attach(model) as attached, attached.masked(masks), pytest.raises(ValueError, match=message):
        generate(model, tokens)
