"""Padding is left out of Γ: a padded prompt has the importances of the prompt alone."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.tiny import GAMMA
from tl_vpd import VPDConfig, bundled
from tl_vpd.forward import MaskedModel
from tl_vpd.hooks import mode_masks
from tl_vpd.training import new_decomposition

PROMPTS = ["import os", "def forward(self, x):\n    return x"]


@pytest.fixture(scope="module")
def shipped():
    """The bundled model, for its tokenizer, with an untrained decomposition whose importances vary."""
    model = bundled.model()
    vpd = new_decomposition(model, VPDConfig(C=8, gamma=GAMMA))
    with torch.no_grad():
        vpd.gamma.unembed.weight.mul_(8)
    return model, vpd


@pytest.fixture(params=["left", "right"])
def padded(request, shipped):
    model, vpd = shipped
    before = model.tokenizer.padding_side
    model.tokenizer.padding_side = request.param
    tokens = model.to_tokens(PROMPTS)
    alone = model.to_tokens(PROMPTS[0])
    n = alone.shape[1]
    assert tokens.shape[1] > n
    real = slice(-n, None) if request.param == "left" else slice(0, n)
    assert torch.equal(tokens[0, real], alone[0])
    yield model, vpd, tokens, alone, real
    model.tokenizer.padding_side = before


def test_importances_of_a_padded_prompt_are_those_of_the_prompt_alone(padded):
    model, vpd, tokens, alone, real = padded
    both, one = vpd.causal_importances(model, tokens), vpd.causal_importances(model, alone)
    assert one.token_mask is None and both.token_mask.sum(1).tolist() == [alone.shape[1], tokens.shape[1]]
    assert_close(both.concatenated[0, real], one.concatenated[0], rtol=0, atol=2e-5)
    assert int(both.l0[0][~both.token_mask[0]].sum()) == 0
    assert torch.equal(vpd.causal_importances(model, PROMPTS).concatenated, both.concatenated)


def test_an_attached_pass_and_its_modes_leave_padding_out_too(padded):
    model, vpd, tokens, alone, real = padded
    both = vpd.causal_importances(model, tokens)
    with torch.no_grad(), vpd.attach(model) as attached:
        _, cache = model.run_with_cache(tokens, names_filter=lambda n: n.endswith("_ci"))
        for name, site in vpd.sites.items():
            assert_close(cache[site.hook_name("ci")], both[name], rtol=0, atol=2e-5)
        with attached.masked("ci"):
            assert_close(model(tokens)[0, real], model(alone)[0], rtol=0, atol=1e-3)


def test_the_adversary_attacks_real_tokens_alone(padded, monkeypatch):
    model, vpd, tokens, _, _ = padded
    token_masks = []
    original = mode_masks.Reconstruction
    monkeypatch.setattr(
        mode_masks,
        "Reconstruction",
        lambda target, kind, token_mask: token_masks.append(token_mask) or original(target, kind, token_mask),
    )
    with torch.no_grad(), vpd.attach(model) as attached, attached.masked("adversarial", steps=1):
        model(tokens)
    (token_mask,) = token_masks
    assert torch.equal(token_mask, vpd.causal_importances(model, tokens).token_mask)


def test_an_explicit_attention_mask_says_what_is_padding(shipped):
    model, vpd = shipped
    alone = model.to_tokens(PROMPTS[1])
    junk = torch.cat([alone[:, :1].expand(1, 3) + 5, alone], dim=1)
    mask = torch.ones_like(junk)
    mask[:, :3] = 0
    expected = vpd.causal_importances(model, alone).concatenated
    found = vpd.causal_importances(model, junk, attention_mask=mask)
    assert_close(found.concatenated[:, 3:], expected, rtol=0, atol=2e-5)
    with torch.no_grad(), vpd.attach(model):
        _, cache = model.run_with_cache(junk, attention_mask=mask, names_filter=lambda n: n.endswith("q_ci"))
    assert_close(cache["q_ci", 1], found["blocks.1.attn.W_Q"], rtol=0, atol=2e-5)


def test_generation_from_padded_prompts_masks_as_the_prompt_alone(shipped):
    model, vpd = shipped

    def generate(prompts):
        return model.generate(
            prompts,
            max_new_tokens=2,
            do_sample=False,
            use_past_kv_cache=False,
            stop_at_eos=False,
            return_type="tokens",
            verbose=False,
        )

    with vpd.attach(model) as attached, attached.masked("ci"):
        assert torch.equal(generate(PROMPTS)[0, -2:], generate(PROMPTS[:1])[0, -2:])


def test_a_masked_pass_over_padding_is_the_one_over_the_prompt_alone(padded):
    model, vpd, tokens, alone, real = padded
    both, one = (vpd.causal_importances(model, t) for t in (tokens, alone))
    with torch.no_grad(), MaskedModel(vpd, model) as masked_model:
        got = masked_model.masked(tokens, both.masks("ci"), both.token_mask)[0, real]
        assert_close(got, masked_model.masked(alone, one.masks("ci"))[0], rtol=0, atol=1e-3)
