"""Adversarial masks of prompts: as bad as the mode's, bounded by importances, reproducible."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.hooks.snapshots import assert_same, snapshot
from tests.tiny import decomposition_of, some_tokens, tiny_model
from tl_vpd import bundled
from tl_vpd.losses import kl_divergence
from tl_vpd.masking import masks_from_sources


def kl_under(model, attached, masks, tokens):
    with torch.no_grad():
        target = model(tokens).log_softmax(-1)
        with attached.masked(masks):
            return float(kl_divergence(target, model(tokens)))


def test_they_are_worse_than_any_random_source_and_with_more_steps_worse_still(model, vpd, tokens):
    g, site_axis = vpd.causal_importances(model, tokens).concatenated, vpd.site_axis
    with vpd.attach(model) as attached:
        chance = []
        for seed in range(8):
            generator = torch.Generator().manual_seed(seed)
            sources = torch.rand(1, 1, site_axis.total + 12, generator=generator, dtype=torch.float64)
            chance.append(kl_under(model, attached, masks_from_sources(g, sources, site_axis), tokens))
        results = [
            kl_under(model, attached, vpd.adversarial_masks(model, tokens, seed=0, **attack), tokens)
            for attack in (dict(steps=1, step_size=1e-9), dict(steps=2), dict(steps=12))
        ]
    assert results[2] > max(chance) and results[2] > results[1] > results[0]


def test_they_lie_between_importance_and_one_with_one_source_for_all_tokens(model, vpd, tokens):
    ci = vpd.causal_importances(model, tokens)
    result = vpd.adversarial_masks(model, tokens, seed=1, steps=3)
    for n, site_mask in result.items():
        g = ci[n]
        assert bool((site_mask.mask >= g - 1e-12).all()) and bool((site_mask.mask <= 1 + 1e-12).all())
        r = (site_mask.mask - g) / (1 - g).clamp_min(1e-9)
        free = g < 0.99
        spread = torch.where(free, r, torch.nan).flatten(0, 1)
        for c in range(6):
            column = spread[:, c][~spread[:, c].isnan()]
            assert column.numel() == 0 or float(column.max() - column.min()) < 1e-9
        assert site_mask.delta.shape == (2, 7) and site_mask.delta.unique().numel() == 1


@pytest.mark.parametrize("sites", [None, "*.mlp.*"])
def test_they_are_those_of_the_mode_with_the_same_seed(model, vpd, tokens, sites):
    result = vpd.adversarial_masks(model, tokens, seed=5, steps=3, step_size=0.3, sites=sites)
    with torch.no_grad(), vpd.attach(model) as attached:
        with attached.masked("adversarial", seed=5, steps=3, step_size=0.3, sites=sites):
            expected, cache = model.run_with_cache(tokens, names_filter=lambda n: n.endswith("_mask"))
        with attached.masked(result):
            assert_close(model(tokens), expected, rtol=1e-9, atol=1e-10)
        assert_close(model.run_with_hooks(tokens, fwd_hooks=vpd.mask_hooks(result)), expected, rtol=1e-9, atol=1e-10)
    assert set(result) == {n for n in vpd.sites if sites is None or ".mlp." in n}
    for n, site_mask in result.items():
        assert_close(site_mask.mask, cache[vpd.sites[n].hook_name("mask")], rtol=1e-9, atol=1e-10)
        assert_close(site_mask.delta, cache[vpd.sites[n].hook_name("delta_mask")].reshape(2, 7), rtol=1e-9, atol=1e-10)


def test_seeds_reproduce_and_without_one_torchs_own_state_counts(model, vpd, tokens):
    def run(seed):
        result = vpd.adversarial_masks(model, tokens, seed=seed, steps=1)
        return torch.cat([site_mask.mask for site_mask in result.values()], -1)

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    before = torch.get_rng_state()
    run(1)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(0)
    a = run(None)
    torch.manual_seed(0)
    assert torch.equal(a, run(None)) and not torch.equal(a, run(None))


def test_what_is_kept_is_one_and_all_others_are_free(model, vpd, tokens):
    kept = [str(s) for s in vpd.site_axis.subcomponents() if s.index != 2]
    result = vpd.adversarial_masks(model, tokens, node_set=kept, seed=0, steps=4, step_size=1.0)
    values = set()
    for site_mask in result.values():
        assert bool((site_mask.mask[..., [0, 1, 3, 4, 5]] == 1).all())
        assert site_mask.mask[..., 2].unique().numel() == 1
        values |= {float(site_mask.mask[0, 0, 2]), float(site_mask.delta[0, 0])}
    assert values == {0.0, 1.0}  # steps as long as the interval end in its corners
    one = vpd.adversarial_masks(model, tokens, node_set="blocks.0.mlp.W_in:1", seed=0, steps=1)
    assert bool((one["blocks.0.mlp.W_in"].mask[..., 1] == 1).all())
    assert not any(bool((site_mask.mask == 1).all()) for site_mask in one.values())


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_they_are_found_with_and_without_gradients(model, vpd, tokens, context):
    expected = vpd.adversarial_masks(model, tokens, seed=0, steps=2)
    with context():
        result = vpd.adversarial_masks(model, tokens.clone(), attention_mask=torch.ones_like(tokens), seed=0, steps=2)
    for n, site_mask in expected.items():
        assert torch.equal(site_mask.mask, result[n].mask) and torch.equal(site_mask.delta, result[n].delta)
        assert not result[n].mask.requires_grad and not result[n].mask.is_inference()
    assert all(p.grad is None for p in [*model.parameters(), *vpd.parameters()])


def test_they_leave_the_model_as_it_was_and_see_the_target_alone(model, vpd, tokens):
    expected = vpd.adversarial_masks(model, tokens, seed=0, steps=2)
    model.add_hook("blocks.0.hook_resid_pre", lambda x, hook: x * 2)
    before = snapshot(model)
    result = vpd.adversarial_masks(model, tokens, seed=0, steps=2)
    assert_same(before, snapshot(model))
    with (
        torch.no_grad(),
        vpd.attach(model) as attached,
        attached.masked("zero"),
        attached.ablated("blocks.0.mlp.W_in:1"),
    ):
        inside = vpd.adversarial_masks(model, tokens, seed=0, steps=2)
    for n, site_mask in expected.items():
        assert torch.equal(site_mask.mask, result[n].mask) and torch.equal(site_mask.mask, inside[n].mask)
    assert_same(before, snapshot(model))


def test_strings_and_padding(monkeypatch):
    model, vpd = bundled.model(kind="hooked_transformer"), bundled.decomposition()
    model.tokenizer.padding_side = "left"
    prompts = ["def f(x):", "def longer(name, value):\n    return"]
    result = vpd.adversarial_masks(model, prompts, seed=0, steps=1, sites="blocks.1.mlp.*")
    tokens = model.to_tokens(prompts)
    by_tokens = vpd.adversarial_masks(model, tokens, seed=0, steps=1, sites="blocks.1.mlp.*")
    token_mask = vpd.causal_importances(model, prompts).token_mask
    for n, site_mask in result.items():
        assert site_mask.mask.shape == (*tokens.shape, vpd.counts[n])
        assert torch.equal(site_mask.mask, by_tokens[n].mask)
        # Padding has importance 0, so its masks are the bare sources, the smallest masks there are.
        bare = site_mask.mask[0, 0]
        assert not bool(token_mask[0, 0]) and bool((site_mask.mask >= bare - 1e-6).all())
    single = vpd.adversarial_masks(model, prompts[0], seed=0, steps=1, sites="blocks.1.mlp.W_in")
    assert single["blocks.1.mlp.W_in"].mask.shape[:2] == model.to_tokens(prompts[0]).shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions_keep_what_is_kept(tokens, dtype):
    model = tiny_model(dtype=dtype)
    vpd = decomposition_of(model)
    kept = [f"{n}:0" for n in vpd.sites]
    result = vpd.adversarial_masks(model, tokens, node_set=kept, seed=0, steps=3)
    with torch.no_grad(), vpd.attach(model) as attached, attached.masked(result):
        assert model(tokens).dtype == dtype
    assert all(bool((site_mask.mask[..., 0] == 1).all()) for site_mask in result.values())


def test_what_does_not_exist_is_said(model, vpd):
    tokens = some_tokens()
    with pytest.raises(KeyError, match=r"did you mean 'blocks\.0\.mlp\.W_in'"):
        vpd.adversarial_masks(model, tokens, sites="blocks.0.mlp.W_ni")
    with pytest.raises(KeyError, match=r"did you mean 'blocks\.0\.mlp\.W_in'"):
        vpd.adversarial_masks(model, tokens, node_set="blocks.0.mlp.W_ni:0")
    with pytest.raises(IndexError, match="0 to 5"):
        vpd.adversarial_masks(model, tokens, node_set="blocks.0.mlp.W_in:6")
    with pytest.raises(ValueError, match="outside the vocabulary"):
        vpd.adversarial_masks(model, tokens + 10)
