"""Constant masks are edited weights: W' = V diag(m) U + m_Δ (W − V U). Per-token masks against a forward of their own."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from tests.tiny import ARCHITECTURES, decomposition_of, draw, edited, matrix_of, some_tokens, tiny_model
from tl_vpd.forward import MaskedModel
from tl_vpd.masking import Masks, SiteMask


def constant(vpd, seed=0):
    """One random factor a subcomponent and Δ, for every site."""
    return {n: (draw(c, seed=seed + i), float(draw(1, seed=99 + i))) for i, (n, c) in enumerate(vpd.counts.items())}


def as_masks(masks, shape=(2, 7)) -> Masks:
    return Masks(
        {n: SiteMask(m.expand(*shape, -1), torch.full(shape, d, dtype=m.dtype)) for n, (m, d) in masks.items()}
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_masked_model_is_the_edited_one(name):
    model = tiny_model(**ARCHITECTURES[name])
    vpd, tokens = decomposition_of(model), some_tokens()
    masks = constant(vpd)
    expected = edited(model, vpd, masks)(tokens)
    assert bool(((expected - model(tokens)).abs() > 1e-2).any())
    with vpd.attach(model) as attached:
        with attached.masked(as_masks(masks)):
            assert_close(model(tokens), expected, rtol=1e-10, atol=1e-10)
        hooked = model.run_with_hooks(tokens, fwd_hooks=vpd.mask_hooks(as_masks(masks)))
        assert_close(hooked, expected, rtol=1e-10, atol=1e-10)
    with MaskedModel(vpd, model) as masked_model:
        assert_close(masked_model.masked(tokens, as_masks(masks)), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["layernorm", "rms, gated, grouped"])
def test_in_float32_they_agree_to_rounding(name):
    model = tiny_model(dtype=torch.float32, **ARCHITECTURES[name])
    vpd, tokens = decomposition_of(model), some_tokens()
    masks = constant(vpd)
    expected = edited(model, vpd, masks)(tokens)
    with vpd.attach(model) as attached, attached.masked(as_masks(masks)):
        assert_close(model(tokens), expected, rtol=1e-4, atol=1e-4)


def test_one_site_alone_and_broadcast_masks(model, vpd, tokens):
    site = "blocks.1.attn.W_O"
    m, d = draw(6), 0.3
    expected = edited(model, vpd, {site: (m, d)})(tokens)
    shapes = [
        SiteMask(m, d),
        SiteMask(m, torch.tensor(d, dtype=torch.float64)),
        SiteMask(m[None, None], torch.full((1, 7), d, dtype=torch.float64)),
        SiteMask(m.expand(1, 7, 6), torch.full((2, 1), d, dtype=torch.float64)),
        SiteMask(m.expand(2, 1, 6), d),
    ]
    with vpd.attach(model, sites=site) as attached:
        for mask in shapes:
            with attached.masked({site: mask}):
                assert_close(model(tokens), expected, rtol=1e-10, atol=1e-10)
            assert_close(
                model.run_with_hooks(tokens, fwd_hooks=vpd.mask_hooks({site: mask})), expected, rtol=1e-10, atol=1e-10
            )


def test_every_other_activation_is_the_edited_models_too(model, vpd, tokens):
    masks = constant(vpd)
    _, expected = edited(model, vpd, masks).run_with_cache(tokens)
    with vpd.attach(model) as attached, attached.masked(as_masks(masks)):
        _, cache = model.run_with_cache(tokens, names_filter=lambda name: name in expected)
    for name in expected:
        assert_close(cache[name], expected[name], rtol=1e-9, atol=1e-10, msg=name)


def by_hand(model, V, U, tokens, masks):
    """A two-layer LayerNorm, standard-position, ReLU transformer, masked site by site with Δ formed."""

    def norm(x, ln):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + model.cfg.eps).sqrt() * ln.w + ln.b

    def linear(x, site, bias):
        columns, delta = masks[site], matrix_of(model, site) - V[site] @ U[site]
        masked = ((x @ V[site]) * columns.mask) @ U[site] + columns.delta[..., None] * (x @ delta)
        if columns.routed is not None:
            masked = torch.where(columns.routed[..., None], masked, x @ matrix_of(model, site))
        return masked + bias.flatten()

    x = model.embed.W_E[tokens] + model.pos_embed.W_pos[: tokens.shape[1]]
    for i, block in enumerate(model.blocks):
        h, a = norm(x, block.ln1), block.attn
        q, k, v = (linear(h, f"blocks.{i}.attn.W_{n}", b) for n, b in zip("QKV", (a.b_Q, a.b_K, a.b_V), strict=True))
        z = []
        for head in range(2):
            columns = slice(4 * head, 4 * head + 4)
            scores = q[..., columns] @ k[..., columns].transpose(1, 2) / math.sqrt(4)
            scores = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -math.inf)
            z.append(scores.softmax(-1) @ v[..., columns])
        x = x + linear(torch.cat(z, dim=-1), f"blocks.{i}.attn.W_O", a.b_O)
        h = linear(norm(x, block.ln2), f"blocks.{i}.mlp.W_in", block.mlp.b_in).relu()
        x = x + linear(h, f"blocks.{i}.mlp.W_out", block.mlp.b_out)
    return norm(x, model.ln_final) @ model.unembed.W_U + model.unembed.b_U


def by_token(vpd, routed=False) -> Masks:
    return Masks(
        {
            n: SiteMask(
                draw(2, 7, c, seed=i), draw(2, 7, seed=50 + i), draw(2, 7, seed=70 + i) < 0.5 if routed else None
            )
            for i, (n, c) in enumerate(vpd.counts.items())
        }
    )


@pytest.mark.parametrize("routed", [False, True])
def test_masks_for_every_token_against_a_forward_written_out(routed):
    model = tiny_model(positional_embedding_type="standard", act_fn="relu")
    vpd, tokens = decomposition_of(model).double(), some_tokens()
    masks = by_token(vpd, routed)
    with torch.no_grad(), vpd.attach(model) as attached:
        expected = by_hand(model, vpd.V, vpd.U, tokens, masks)
        with attached.masked(masks):
            assert_close(model(tokens), expected, rtol=1e-10, atol=1e-10)
        assert_close(model.run_with_hooks(tokens, fwd_hooks=vpd.mask_hooks(masks)), expected, rtol=1e-10, atol=1e-10)
    with torch.no_grad(), MaskedModel(vpd, model) as masked_model:
        assert_close(masked_model.masked(tokens, masks), expected, rtol=1e-10, atol=1e-10)


def test_gradients_of_v_u_and_masks_are_those_of_the_forward_written_out():
    model = tiny_model(positional_embedding_type="standard", act_fn="relu")
    vpd, tokens = decomposition_of(model).double(), some_tokens()
    site = "blocks.0.attn.W_K"
    masks, weights = by_token(vpd), torch.randn(2, 7, 11, dtype=torch.float64)
    leaves = [masks[site].mask.requires_grad_(), masks[site].delta.requires_grad_(), vpd.V[site], vpd.U[site]]
    with vpd.attach(model) as attached, attached.masked(masks):
        got = torch.autograd.grad((model(tokens) * weights).sum(), leaves)
    expected = torch.autograd.grad((by_hand(model, vpd.V, vpd.U, tokens, masks) * weights).sum(), leaves)
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, rtol=1e-9, atol=1e-10)
