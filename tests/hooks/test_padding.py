"""Padding: what counts as it, and that a padded prompt has the importances and masked logits of the prompt alone."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from tests.marks import needs_bridge, needs_hooked_transformer
from tests.tiny import GAMMA, options_of
from tl_vpd import SiteMask, VPDConfig, bundled
from tl_vpd.adapters import adapt
from tl_vpd.forward import MaskedModel
from tl_vpd.hooks import mode_masks
from tl_vpd.masking.modes import MODES
from tl_vpd.training import new_decomposition

from .test_generate import generate

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
    result = vpd.causal_importances(model, junk, attention_mask=mask)
    assert_close(result.concatenated[:, 3:], expected, rtol=0, atol=2e-5)
    with torch.no_grad(), vpd.attach(model):
        _, cache = model.run_with_cache(junk, attention_mask=mask, names_filter=lambda n: n.endswith("q_ci"))
    assert_close(cache["q_ci", 1], result["blocks.1.attn.W_Q"], rtol=0, atol=2e-5)


def test_generation_from_padded_prompts_masks_as_the_prompt_alone(shipped):
    model, vpd = shipped
    with vpd.attach(model) as attached, attached.masked("ci"):
        both, one = (
            generate(model, p, 2, use_past_kv_cache=False, return_type="tokens") for p in (PROMPTS, PROMPTS[:1])
        )
    assert torch.equal(both[0, -2:], one[0, -2:])


def test_a_masked_pass_over_padding_is_the_one_over_the_prompt_alone(padded):
    model, vpd, tokens, alone, real = padded
    both, one = (vpd.causal_importances(model, t) for t in (tokens, alone))
    with torch.no_grad(), MaskedModel(vpd, model) as masked_model:
        got = masked_model.masked(tokens, both.masks("ci"), both.token_mask)[0, real]
        assert_close(got, masked_model.masked(alone, one.masks("ci"))[0], rtol=0, atol=1e-3)


# -- a tokenizer whose pad token is BOS and EOS too, as GPT-2's is ---------------------------------------------------------


@pytest.fixture(
    params=[
        pytest.param("hooked_transformer", marks=needs_hooked_transformer),
        pytest.param("bridge", marks=needs_bridge),
    ]
)
def either(request):
    """The bundled model of each class; its tokenizer's pad, BOS and EOS are token 0."""
    model = bundled.model(kind=request.param)
    assert model.tokenizer.pad_token_id == model.tokenizer.bos_token_id == model.tokenizer.eos_token_id == 0
    return model


@pytest.mark.parametrize(
    ("side", "tokens", "padding"),
    [
        ("right", [[0]], None),
        ("right", [[0, 5, 0]], None),
        ("right", [[0, 5, 0, 0]], None),
        ("right", [[0, 5, 0], [0, 7, 0]], None),
        ("right", [[0], [0]], None),
        ("right", [[0, 5, 0, 9], [0, 6, 7, 8]], None),
        ("right", [[0, 5, 0, 0], [0, 6, 7, 8]], [[1, 1, 0, 0], [1, 1, 1, 1]]),
        ("right", [[0, 0, 0], [0, 6, 7]], [[1, 0, 0], [1, 1, 1]]),
        ("left", [[0]], None),
        ("left", [[0, 5, 6]], None),
        ("left", [[0, 5, 0]], None),
        ("left", [[0, 0, 0, 5], [0, 6, 7, 8]], [[0, 0, 1, 1], [1, 1, 1, 1]]),
        ("left", [[0, 0, 0], [0, 6, 7]], [[0, 0, 1], [1, 1, 1]]),
    ],
)
def test_what_counts_as_padding(either, side, tokens, padding):
    either.tokenizer.padding_side = side
    token_mask = adapt(either).padding(torch.tensor(tokens), None)
    assert (token_mask is None) if padding is None else torch.equal(token_mask, torch.tensor(padding).bool())


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_of_pad_tokens_has_a_real_one_also_where_bos_is_not_prepended(shipped, side, monkeypatch):
    model, _ = shipped
    monkeypatch.setattr(model.tokenizer, "padding_side", side)
    monkeypatch.setattr(model.cfg, "default_prepend_bos", False)
    token_mask = adapt(model).padding(torch.tensor([[0, 0, 0], [4, 5, 6]]), None)
    assert token_mask[0].tolist() == ([False, False, True] if side == "left" else [True, False, False])


@pytest.mark.parametrize("side", ["left", "right"])
def test_bos_alone_is_a_prompt_like_any_other(either, side):
    either.tokenizer.padding_side = side
    vpd = bundled.decomposition()
    ci = vpd.causal_importances(either, "")
    assert ci.tokens.tolist() == [[0]] and ci.token_mask is None
    with torch.no_grad(), MaskedModel(vpd, either) as masked_model:
        _, inputs = masked_model.clean(torch.tensor([[0]]))
        by_hand = vpd.pre_sigmoid(inputs).clamp(0, 1)
        expected = masked_model.masked(torch.tensor([[0]]), ci.masks("ci"))
    assert_close(ci.concatenated, by_hand)
    assert bool((ci.concatenated > 0).any())
    with torch.no_grad(), vpd.attach(either) as attached:
        with attached.masked("ci"):
            assert_close(either(torch.tensor([[0]])), expected, rtol=1e-5, atol=1e-5)
        with attached.masked("zero"):
            assert not torch.allclose(either(torch.tensor([[0]])), expected, atol=1e-2)


def without_delta(model, vpd):
    """A copy of the model with ``V @ U`` in the place of every weight: what the mode ``unmasked`` computes."""
    other = copy.deepcopy(model)
    for name in vpd.sites:
        adapt(other).set_weight(name, (vpd.V[name] @ vpd.U[name]).detach())
    return other


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_that_ends_in_eos_is_masked_to_its_end(either, side):
    either.tokenizer.padding_side = side
    vpd, tokens = bundled.decomposition(), torch.tensor([[0, 633, 0, 696, 0]])
    with torch.no_grad():
        expected = without_delta(either, vpd)(tokens)
        with vpd.attach(either) as attached, attached.masked("unmasked"):
            assert_close(either(tokens), expected, rtol=1e-4, atol=1e-3)
    ci = vpd.causal_importances(either, tokens)
    assert ci.token_mask is None and int(ci.l0[0, -1]) > 0


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_past_kv_cache", [True, False])
@pytest.mark.parametrize("tokens", [[[0, 633, 696, 0]], [[0, 633, 0, 696]], [[0]], [[0, 633, 0], [0, 5, 7]]])
def test_generation_past_eos_is_that_of_the_edited_model(either, side, use_past_kv_cache, tokens):
    either.tokenizer.padding_side = side
    vpd, tokens = bundled.decomposition(), torch.tensor(tokens)
    other = without_delta(either, vpd)
    four = partial(generate, prompts=tokens, n=4, use_past_kv_cache=use_past_kv_cache)
    with torch.no_grad():
        expected = four(other)
        with vpd.attach(either) as attached, attached.masked(lambda site, acts: SiteMask(None, 0.0)):
            assert torch.equal(four(either), expected)
        if len(tokens) == 1 or side == "left":  # else the row that ends in EOS cannot be told from a padded one
            with vpd.attach(either) as attached, attached.masked("unmasked"):
                assert torch.equal(four(either), expected)


def test_a_mode_with_importances_masks_an_eos_that_generation_starts_from(shipped):
    model, vpd = shipped
    last = []
    keep = [("blocks.0.hook_q_mask", lambda mask, hook: last.append(mask[:, -1].clone()))]
    with torch.no_grad(), vpd.attach(model) as attached, attached.masked("ci"), model.hooks(fwd_hooks=keep):
        generate(model, torch.tensor([[0, 633, 0]]), 2, use_past_kv_cache=False)
    assert len(last) == 2 and all(bool((mask < 1).any()) and bool((mask > 0).any()) for mask in last)


def test_padding_runs_unmasked_in_every_mode(padded):
    model, vpd, tokens, _, _ = padded
    token_mask = vpd.causal_importances(model, tokens).token_mask
    names = ["blocks.0.attn.hook_q", "blocks.0.hook_q_mask", "blocks.0.hook_q_delta_mask"]
    with torch.no_grad(), vpd.attach(model) as attached:
        _, clean = model.run_with_cache(tokens, names_filter=names[:1])
        for mode in MODES:
            with attached.masked(mode, **options_of(mode, steps=1, seed=0)):
                _, cache = model.run_with_cache(tokens, names_filter=names)
                _, alone = model.run_with_cache(tokens, names_filter=names[:1])  # no hook listens
            for q in (cache[names[0]], alone[names[0]]):
                assert torch.equal(q[~token_mask], clean[names[0]][~token_mask]), mode
                assert not torch.allclose(q[token_mask], clean[names[0]][token_mask], atol=1e-4), mode
            assert bool((cache[names[1]][~token_mask] == 1).all()) and bool((cache[names[2]][~token_mask] == 1).all())
        ci = vpd.causal_importances(model, tokens)
        masks = [ci.masks("zero"), vpd.adversarial_masks(model, tokens, steps=1)]
        assert all(torch.equal(m.routed, token_mask) for by_site in masks for m in by_site.values())


def test_an_attention_mask_of_the_user_is_what_it_says(shipped):
    """A lone row padded on the right, which without a mask would be a row that ends in EOS."""
    model, vpd = shipped
    tokens, mask = torch.tensor([[0, 633, 696, 0, 0]]), torch.tensor([[1, 1, 1, 0, 0]])
    alone = vpd.causal_importances(model, tokens[:, :3])
    ci = vpd.causal_importances(model, tokens, attention_mask=mask)
    assert ci.token_mask.tolist() == [[True, True, True, False, False]]
    assert_close(ci.concatenated[:, :3], alone.concatenated, rtol=0, atol=2e-5)
    with torch.no_grad(), vpd.attach(model) as attached, attached.masked("ci"):
        _, cache = model.run_with_cache(tokens, attention_mask=mask, names_filter=lambda n: n.endswith("q_mask"))
    assert bool((cache["q_mask", 0][:, 3:] == 1).all()) and not bool((cache["q_mask", 0][:, :3] == 1).all())
