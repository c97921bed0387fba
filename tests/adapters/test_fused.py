"""Attention in one call: the same numbers and gradients, only where nobody hooks scores or pattern, and gone afterwards."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.tiny import decomposition_of, draw, some_tokens, tiny_model
from tl_vpd.adapters import adapt
from tl_vpd.adapters.fused import METHODS, can_be_fused
from tl_vpd.forward import BlockedMasks, MaskedModel, MaskInputs

SETTINGS = [
    {},
    {"n_key_value_heads": 1},
    {"n_key_value_heads": 1, "ungroup_grouped_query_attention": True},
    {"positional_embedding_type": "standard"},
    {"use_attn_scale": False},
    {"attention_dir": "bidirectional"},
]


@pytest.fixture
def calls(monkeypatch):
    """How often the one call is made."""
    made, original = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: made.append(1) or original(*a, **k)
    )
    return made


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: ", ".join(s) or "rotary")
def test_outputs_and_gradients_are_those_of_scores_and_pattern(settings, calls):
    model, tokens = tiny_model(**settings), some_tokens()
    plain = model(tokens)
    with adapt(model).fused_attention():
        assert_close(model(tokens), plain, rtol=1e-10, atol=1e-12)
    assert len(calls) == 2 and not any(name in block.attn.__dict__ for block in model.blocks for name in METHODS)
    assert torch.equal(model(tokens), plain)
    vpd, results = decomposition_of(model).double(), []
    width, g = vpd.site_axis.total, draw(2, 7, vpd.site_axis.total, seed=1)
    sources = draw(14, width + len(vpd.site_axis.names), seed=2)
    for fused in (False, True):
        of_g = torch.zeros_like(g)
        with MaskedModel(vpd, model, fused_attention=fused) as masked_model:
            run = BlockedMasks(g, MaskInputs(sources), vpd.site_axis, grad_g=of_g)
            (output := masked_model.masked(tokens, run)).square().sum().backward()
        results.append((output.detach(), of_g))
    assert_close(results[0], results[1], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["hook_pattern", "hook_attn_scores"])
def test_a_hooked_pattern_is_still_there(name, calls):
    model, tokens, recorded = tiny_model(), some_tokens(), []
    hook = f"blocks.1.attn.{name}"
    with adapt(model).fused_attention():
        assert len(calls) == 0
    with model.hooks(fwd_hooks=[(hook, lambda t, hook: recorded.append(t.shape))]), adapt(model).fused_attention():
        model(tokens)
    assert len(calls) == 1 and recorded[0][-2:] == (7, 7)


@pytest.mark.parametrize(
    "settings",
    [
        {"positional_embedding_type": "alibi"},
        {"attn_scores_soft_cap": 5.0},
        {"use_local_attn": True, "window_size": 3, "attn_types": ["local", "local"]},
    ],
    ids=lambda s: next(iter(s)),
)
def test_other_kinds_of_attention_are_left_alone(settings, calls):
    model, tokens = tiny_model(**settings), some_tokens()
    assert not any(can_be_fused(block.attn) for block in model.blocks)
    plain = model(tokens)
    with adapt(model).fused_attention():
        assert torch.equal(model(tokens), plain)
    assert not calls


def test_padding_is_computed_the_long_way(calls):
    model, tokens = tiny_model(), some_tokens()
    token_mask = torch.ones_like(tokens, dtype=torch.bool)
    token_mask[0, :2] = False
    with MaskedModel(decomposition_of(model).double(), model, fused_attention=True) as masked_model:
        masked_model.clean(tokens, token_mask)
        assert not calls
        masked_model.clean(tokens)
    assert len(calls) == 2
