"""Masked modes against their formulas, nesting, seeds, and importances that users patch."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.tiny import options_of
from tl_vpd.losses import kl_divergence
from tl_vpd.masking import SiteMask
from tl_vpd.masking.modes import MODES, NEED_IMPORTANCES, masks_of_mode
from tl_vpd.site import ConcatenatedAxis

IN = "blocks.1.mlp.W_in"


def test_formulas_of_the_modes():
    site_axis = ConcatenatedAxis({"a": 2, "b": 1})
    g = torch.tensor([[[0.0, 0.5, 1.0], [0.25, 0.1, 0.0]]])

    def concatenated(mode, **more):
        masks = masks_of_mode(mode, g, site_axis, **more)
        return torch.cat([m.mask for m in masks.values()], -1), torch.stack([m.delta for m in masks.values()], -1)

    ones = torch.ones_like(g)
    for mode, mask in {"unmasked": ones, "zero": 0 * ones, "ci": g, "rounded": (g > 0).float()}.items():
        assert_close(concatenated(mode), (mask, torch.zeros(1, 2, 2)))
        assert_close(concatenated(mode, delta=0.5), (mask, torch.full((1, 2, 2), 0.5)))
        drawn_mask, drawn = concatenated(mode, delta="drawn", generator=torch.Generator().manual_seed(0))
        assert torch.equal(drawn_mask, mask) and drawn.unique().numel() == 4
    assert_close(concatenated("rounded", threshold=0.1)[0], (g > 0.1).float())
    mask, delta = concatenated("stochastic", generator=torch.Generator().manual_seed(0))
    r = (mask - g) / (1 - g)
    assert torch.equal(mask[g == 1], torch.ones(1)) and bool(((mask >= g) & (mask <= 1)).all())
    assert r[g < 1].unique().numel() == 5
    assert delta.unique().numel() == 4
    assert_close(concatenated("stochastic", delta=1.0)[1], torch.ones(1, 2, 2))


@pytest.mark.parametrize("mode", [m for m in MODES if m != "adversarial"])
def test_a_mode_is_the_forward_under_its_masks(model, vpd, tokens, mode):
    ci = vpd.causal_importances(model, tokens)
    with torch.no_grad(), vpd.attach(model) as attached:
        for delta in (None, 1.0, 0.5):
            with attached.masked(mode, **options_of(mode, seed=4, delta=delta, threshold=0.2)):
                got = model(tokens)
            if mode == "stochastic":
                continue
            masks = ci.masks(mode, **options_of(mode, delta=delta, threshold=0.2))
            assert_close(got, model.run_with_hooks(tokens, fwd_hooks=vpd.mask_hooks(masks)), rtol=1e-10, atol=1e-10)
        if mode == "stochastic":
            with attached.masked(mode, **options_of(mode, seed=4)):
                got = model(tokens)
            with attached.masked(ci.masks(mode, **options_of(mode, seed=4))):
                assert_close(got, model(tokens), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", ["stochastic", "adversarial"])
def test_seeds_reproduce_and_draws_differ_between_passes(model, vpd, tokens, mode):
    def run(seed, n=2):
        with torch.no_grad(), attached.masked(mode, **options_of(mode, seed=seed, steps=1)):
            return [model(tokens) for _ in range(n)]

    with vpd.attach(model) as attached:
        first, again, other = run(1), run(1), run(2)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], other[0])
        torch.manual_seed(0)
        unseeded = run(None)
        torch.manual_seed(0)
        assert all(torch.equal(a, b) for a, b in zip(unseeded, run(None), strict=True))


def test_the_adversary_is_at_least_as_bad_as_chance_and_worse_with_more_steps(model, vpd, tokens):
    with torch.no_grad(), vpd.attach(model) as attached:
        target = model(tokens).log_softmax(-1)

        def kl(mode, seed=0, **more):
            with attached.masked(mode, **options_of(mode, seed=seed, **more)):
                return float(kl_divergence(target, model(tokens)))

        chance = [kl("stochastic", seed) for seed in range(5)]
        attacked = kl("adversarial", steps=8)
        assert attacked > max(chance) and attacked > kl("adversarial", steps=1, step_size=1e-9)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_every_mode_gives_the_same_with_and_without_gradients(model, vpd, tokens, context):
    with vpd.attach(model) as attached:
        for mode in MODES:
            with torch.no_grad(), attached.masked(mode, **options_of(mode, seed=0, steps=2)):
                expected = model(tokens)
            with context(), attached.masked(mode, **options_of(mode, seed=0, steps=2)):
                assert_close(model(tokens.clone()), expected, rtol=1e-12, atol=1e-12, msg=mode)


def test_no_mode_leaves_gradients_behind(model, vpd, tokens):
    with vpd.attach(model) as attached:
        for mode in MODES:
            with attached.masked(mode, **options_of(mode, steps=2)):
                model(tokens)
    assert all(p.grad is None for p in [*model.parameters(), *vpd.parameters()])


def test_the_innermost_context_counts_and_the_outer_one_comes_back(model, vpd, tokens):
    ci = vpd.causal_importances(model, tokens)
    with torch.no_grad(), vpd.attach(model) as attached:
        clean = model(tokens)
        with attached.masked("zero"):
            zero = model(tokens)
            with attached.masked(ci.masks("ci")):
                with attached.masked(ci.masks("rounded")):
                    rounded = model(tokens)
                between = model(tokens)
            with attached.masked("zero"), attached.masked("unmasked", delta=1.0):
                assert torch.equal(model(tokens), clean)
            assert torch.equal(model(tokens), zero)
        assert torch.equal(model(tokens), clean)
        with attached.masked("ci"):
            assert_close(between, model(tokens), rtol=1e-10, atol=1e-10)
        with attached.masked("rounded"):
            assert_close(rounded, model(tokens), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_every_way_of_calling_the_model_runs_masked(model, vpd, tokens, mode):
    """``run_with_hooks`` and ``generate`` call ``forward`` itself; a plain call goes through the module."""
    with torch.no_grad(), vpd.attach(model) as attached:
        ways = [
            lambda: model(tokens),
            lambda: model.forward(tokens),
            lambda: model(input=tokens),
            lambda: model(tokens, "logits"),
            lambda: model.run_with_hooks(tokens, fwd_hooks=[("hook_embed", lambda x, hook: None)]),
            lambda: model.run_with_cache(tokens)[0],
            lambda: model(tokens, return_type="both").logits,
        ]
        results = []
        for way in ways:
            with attached.masked(mode, **options_of(mode, seed=0, steps=2)):
                results.append(way())
        assert all(torch.equal(r, results[0]) for r in results) and not torch.equal(results[0], model(tokens))


def test_the_clean_pass_of_a_mode_does_not_see_users_hooks(model, vpd, tokens):
    """Importances are of the target on this prompt; what the user patched acts in the masked pass alone."""
    patch = ("blocks.0.hook_resid_post", lambda x, hook: x * 0.5)
    masks = vpd.causal_importances(model, tokens).masks("rounded")
    calls = []
    with torch.no_grad(), vpd.attach(model) as attached:
        with attached.masked("rounded"):
            hooks = [patch, ("hook_embed", lambda x, hook: calls.append(1))]
            got = model.run_with_hooks(tokens, fwd_hooks=hooks)
        expected = model.run_with_hooks(tokens, fwd_hooks=[patch, *vpd.mask_hooks(masks)])
    assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert calls == [1]


@pytest.mark.parametrize("how", ["returned", "in place"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_importances_that_a_user_patches_make_the_masks(model, vpd, tokens, how, context):
    def patch(g, hook):
        if how == "in place":
            g[:, 2] = 1.0
            return None
        return torch.cat([g[:, :2], torch.ones_like(g[:, :1]), g[:, 3:]], dim=1)

    recorded = {}
    hooks = [("blocks.1.hook_in_ci", patch), ("blocks.1.hook_in_mask", lambda m, hook: recorded.update(mask=m))]
    expected = vpd.causal_importances(model, tokens)[IN].clone()
    expected[:, 2] = 1.0
    with context(), vpd.attach(model) as attached, attached.masked("ci"):
        model.run_with_hooks(tokens, fwd_hooks=hooks)
    assert_close(recorded["mask"], expected, rtol=1e-10, atol=1e-10)


def test_idle_importances_are_those_of_the_prompt(model, vpd, tokens):
    ci = vpd.causal_importances(model, tokens)
    assert 0 < float((ci.concatenated == 0).double().mean()) < 1 and bool(
        ((ci.concatenated > 0) & (ci.concatenated < 1)).any()
    )
    with vpd.attach(model) as attached:
        _, cache = model.run_with_cache(tokens)
        with attached.masked("stochastic"):
            _, masked = model.run_with_cache(tokens)
    for name, site in vpd.sites.items():
        assert_close(cache[site.hook_name("ci")], ci[name], rtol=1e-10, atol=1e-10)
        assert_close(masked[site.hook_name("ci")], ci[name], rtol=1e-10, atol=1e-10)


def test_sites_of_a_mode_are_masked_and_the_others_run_as_they_are(model, vpd, tokens):
    with torch.no_grad(), vpd.attach(model) as attached:
        for mode in (*NEED_IMPORTANCES, "zero"):
            with attached.masked(mode, sites="*.W_in", **options_of(mode, seed=0, steps=1)):
                _, cache = model.run_with_cache(tokens, names_filter=lambda n: n.endswith("_mask"))
            touched = {n for n, m in cache.items() if not bool((m == 1).all())}
            masks, deltas = ({f"blocks.{i}.hook_in_{k}" for i in range(2)} for k in ("mask", "delta_mask"))
            assert masks <= touched <= masks | deltas, mode  # an attacked Δ may stay at 1


def test_a_function_gives_masks_from_activations(model, vpd, tokens):
    names = []

    def strongest(site, acts):
        names.append(site)
        return (acts.abs() == acts.abs().amax(-1, keepdim=True)).to(acts.dtype)

    with torch.no_grad(), vpd.attach(model) as attached, attached.masked(strongest, sites="*.W_in"):
        _, cache = model.run_with_cache(tokens)
    assert names == ["blocks.0.mlp.W_in", IN]
    assert torch.equal(cache["in_mask", 1].argmax(-1), cache["in_component_acts", 1].abs().argmax(-1))
    assert torch.equal(cache["in_delta_mask", 1], torch.ones(2, 7, 1, dtype=torch.float64))
    with torch.no_grad(), vpd.attach(model) as attached:
        with attached.masked(lambda site, acts: SiteMask(torch.zeros_like(acts), torch.zeros_like(acts[..., 0]))):
            got = model(tokens)
        with attached.masked("zero"):
            assert torch.equal(got, model(tokens))


@pytest.mark.parametrize("mode", NEED_IMPORTANCES)
def test_what_skips_blocks_is_refused_where_importances_are_needed(model, vpd, tokens, mode):
    with vpd.attach(model) as attached:
        with attached.masked(mode, **options_of(mode, steps=1)):
            with pytest.raises(ValueError, match=f"{mode}' needs every site's input, and stop_at_layer skips blocks"):
                model(tokens, stop_at_layer=1)
            with pytest.raises(ValueError, match="start_at_layer skips blocks"):
                model(model.embed(tokens), start_at_layer=1)
        with pytest.raises(ValueError, match="hook_ci needs every site's input, and stop_at_layer"):
            model.run_with_cache(tokens, stop_at_layer=1)
        truncated, cache = model.run_with_cache(tokens, stop_at_layer=1, names_filter=lambda n: "component_acts" in n)
        assert torch.equal(truncated, model.run_with_cache(tokens)[1]["resid_post", 0]) and len(cache) == 6


def test_starting_at_layer_zero_skips_nothing(model, vpd, tokens):
    with torch.no_grad(), vpd.attach(model) as attached, attached.masked("rounded"):
        assert torch.equal(model(model.embed(tokens), start_at_layer=0), model(tokens))
