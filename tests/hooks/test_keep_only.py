"""Keeping some subcomponents alone: the rest zero, drawn, or found by an adversary."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.tiny import edited, options_of, some_tokens
from tl_vpd.losses import kl_divergence
from tl_vpd.masking import Masks, SiteMask
from tl_vpd.site import Subcomponent

from .test_generate import generate, greedy

IN, OUT, Q = "blocks.1.mlp.W_in", "blocks.1.mlp.W_out", "blocks.0.attn.W_Q"
KEPT = [f"{IN}:0", f"{IN}:3", f"{OUT}:5", f"{Q}:1"]


def indicator(vpd, kept=KEPT):
    """One mask a site: 1 for what is kept."""
    results = {n: torch.zeros(c, dtype=torch.float64) for n, c in vpd.counts.items()}
    for address in kept:
        site, index = address.rsplit(":", 1)
        results[site][int(index)] = 1
    return results


@pytest.mark.parametrize("delta", [None, 0.0, 1.0, 0.5])
def test_with_the_rest_zero_it_is_the_model_edited_by_hand(model, vpd, tokens, delta):
    masks = {n: (m, delta or 0.0) for n, m in indicator(vpd).items()}
    expected = edited(model, vpd, masks)(tokens)
    with torch.no_grad(), vpd.attach(model) as attached, attached.keep_only(KEPT, delta=delta):
        assert_close(model(tokens), expected, rtol=1e-10, atol=1e-10)


def test_everything_kept_with_delta_is_the_model_itself_to_the_bit(model, vpd, tokens):
    every = [str(s) for s in vpd.site_axis.subcomponents()]
    with torch.no_grad(), vpd.attach(model) as attached:
        clean = model(tokens)
        for rest in ("zero", "stochastic"):
            with attached.keep_only(every, rest=rest, delta=1.0):
                assert torch.equal(model(tokens), clean)
        with attached.keep_only([]), attached.masked("zero"):
            nothing = model(tokens)
        with attached.keep_only([]):
            assert torch.equal(model(tokens), nothing)


@pytest.mark.parametrize("pos", [None, 2, [0, -1], slice(3, None)])
def test_sites_and_positions_that_are_not_named_run_unmasked(model, vpd, tokens, pos):
    where = torch.zeros(7, dtype=torch.bool)
    where[slice(None) if pos is None else pos] = True
    given = indicator(vpd)
    masks = Masks(
        {
            n: SiteMask(given[n].expand(2, 7, 6), torch.zeros(2, 7, dtype=torch.float64), where.expand(2, 7))
            for n in (IN, OUT)
        }
    )
    with torch.no_grad(), vpd.attach(model) as attached:
        with attached.masked(masks):
            expected = model(tokens)
        with attached.keep_only(KEPT, sites="blocks.1.mlp.*", pos=pos):
            assert_close(model(tokens), expected, rtol=1e-10, atol=1e-10)
            _, cache = model.run_with_cache(tokens, names_filter=lambda n: n.endswith("_mask"))
    for n in (IN, OUT):
        expected = torch.where(where[:, None], given[n], 1.0).expand(2, 7, 6)
        assert torch.equal(cache[vpd.sites[n].hook_name("mask")], expected)
        assert torch.equal(cache[vpd.sites[n].hook_name("delta_mask")].flatten(), (~where).double().repeat(2))
    assert bool((cache["q_mask", 0] == 1).all())


def test_with_the_rest_drawn_what_is_kept_stays_and_everything_else_is_uniform(model, vpd, tokens):
    tokens = some_tokens(shape=(40, 7))
    with torch.no_grad(), vpd.attach(model) as attached, attached.keep_only(KEPT, rest="stochastic", seed=3):
        _, cache = model.run_with_cache(tokens, names_filter=lambda n: n.endswith("_mask"))
    for n, row in indicator(vpd).items():
        mask = cache[vpd.sites[n].hook_name("mask")]
        assert bool((mask[..., row == 1] == 1).all())
        drawn = mask[..., row == 0]
        assert drawn.unique().numel() > 0.95 * drawn.numel()
        assert float(drawn.min()) >= 0 and float(drawn.max()) <= 1
        assert abs(float(drawn.mean()) - 0.5) < 0.05 and abs(float(drawn.var()) - 1 / 12) < 0.02
        delta = cache[vpd.sites[n].hook_name("delta_mask")]
        assert delta.unique().numel() > 0.95 * delta.numel() and abs(float(delta.mean()) - 0.5) < 0.08


def test_the_drawn_masks_are_the_ones_that_act(model, vpd, tokens):
    with torch.no_grad(), vpd.attach(model) as attached:
        with attached.keep_only(KEPT, rest="stochastic", seed=3):
            got, cache = model.run_with_cache(tokens, names_filter=lambda n: n.endswith("_mask"))
        masks = Masks(
            {
                n: SiteMask(cache[s.hook_name("mask")], cache[s.hook_name("delta_mask")].reshape(2, 7))
                for n, s in vpd.sites.items()
            }
        )
        with attached.masked(masks):
            assert torch.equal(model(tokens), got)


@pytest.mark.parametrize("rest", ["stochastic", "adversarial"])
def test_seeds_reproduce(model, vpd, tokens, rest):
    def run(seed):
        with torch.no_grad(), attached.keep_only(KEPT, rest=rest, **options_of(rest, seed=seed, steps=1)):
            return [model(tokens) for _ in range(2)]

    with vpd.attach(model) as attached:
        first, again, other = run(1), run(1), run(2)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not torch.equal(*first) and not torch.equal(first[0], other[0])


def test_the_adversary_finds_something_worse_than_zero_or_chance_and_leaves_what_is_kept(model, vpd, tokens):
    # Nearly everything is kept, so that ablating the rest is mild and an adversary has something to find.
    kept = [str(s) for s in vpd.site_axis.subcomponents() if s.index < 5]
    with torch.no_grad(), vpd.attach(model) as attached:
        target = model(tokens).log_softmax(-1)

        def kl(rest, **how):
            with attached.keep_only(kept, rest=rest, **how):
                return float(kl_divergence(target, model(tokens)))

        chance = [kl("stochastic", seed=s) for s in range(5)]
        attacked = kl("adversarial", seed=0, steps=10)
        assert attacked > max(chance)
        assert attacked > kl("adversarial", seed=0, steps=1, step_size=1e-9)
        with attached.keep_only(kept, rest="adversarial", seed=0, steps=3):
            _, cache = model.run_with_cache(tokens, names_filter=lambda n: n.endswith("_mask"))
    for n in vpd.sites:
        mask = cache[vpd.sites[n].hook_name("mask")]
        assert bool((mask[..., :5] == 1).all())
        assert torch.equal(mask, mask[:1, :1].expand_as(mask))  # one source a subcomponent, over batch and positions


def test_the_adversarial_rest_is_the_masks_that_adversarial_masks_finds(model, vpd, tokens):
    with torch.no_grad(), vpd.attach(model) as attached:
        with attached.keep_only(KEPT, rest="adversarial", seed=4, steps=3, step_size=0.2, sites="*.mlp.*"):
            expected = model(tokens)
        result = vpd.adversarial_masks(model, tokens, node_set=KEPT, seed=4, steps=3, step_size=0.2, sites="*.mlp.*")
        with attached.masked(result):
            assert_close(model(tokens), expected, rtol=1e-9, atol=1e-9)


def test_a_kv_cache_works(model, vpd, tokens):
    with torch.no_grad(), vpd.attach(model) as attached:
        with attached.keep_only(KEPT):
            assert torch.equal(generate(model, tokens), greedy(model, tokens))
        with attached.keep_only(KEPT, rest="stochastic", seed=0):
            a = generate(model, tokens)
        with attached.keep_only(KEPT, rest="stochastic", seed=0):
            assert torch.equal(a, generate(model, tokens))
        with attached.keep_only(KEPT, rest="adversarial", steps=1, seed=0):
            a = generate(model, tokens)
        with attached.keep_only(KEPT, rest="adversarial", steps=1, seed=0):
            assert torch.equal(a, generate(model, tokens))


@pytest.mark.parametrize("rest", ["zero", "stochastic", "adversarial"])
def test_importances_can_be_listened_to_and_are_the_prompts(model, vpd, tokens, rest):
    ci = vpd.causal_importances(model, tokens)
    with (
        torch.no_grad(),
        vpd.attach(model) as attached,
        attached.keep_only(KEPT, rest=rest, **options_of(rest, seed=1, steps=1)),
    ):
        plain = model(tokens)
    with (
        torch.no_grad(),
        vpd.attach(model) as attached,
        attached.keep_only(KEPT, rest=rest, **options_of(rest, seed=1, steps=1)),
    ):
        logits, cache = model.run_with_cache(tokens, names_filter=lambda n: n.endswith("_ci"))
        assert torch.equal(logits, plain)
    for n, site in vpd.sites.items():
        assert_close(cache[site.hook_name("ci")], ci[n], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rest", ["zero", "stochastic"])
def test_nothing_but_the_masked_pass_runs_without_an_adversary(model, vpd, tokens, rest, monkeypatch):
    asked = []
    gamma = vpd.gamma.forward
    monkeypatch.setattr(vpd.gamma, "forward", lambda *a, **k: asked.append(1) or gamma(*a, **k))
    with torch.no_grad(), vpd.attach(model) as attached, attached.keep_only(KEPT, rest=rest):
        model.run_with_hooks(tokens, fwd_hooks=[("hook_embed", lambda x, hook: asked.append("pass"))])
        model(tokens, stop_at_layer=1)
    assert asked == ["pass"]


@pytest.mark.parametrize("rest", ["zero", "stochastic", "adversarial"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_with_and_without_gradients_it_is_the_same(model, vpd, tokens, rest, context):
    with vpd.attach(model) as attached:
        with torch.no_grad(), attached.keep_only(KEPT, rest=rest, **options_of(rest, seed=0, steps=2)):
            expected = model(tokens)
        with context(), attached.keep_only(KEPT, rest=rest, **options_of(rest, seed=0, steps=2)):
            assert_close(model(tokens.clone()), expected, rtol=1e-12, atol=1e-12)
    assert all(p.grad is None for p in [*model.parameters(), *vpd.parameters()])


def test_contexts_nest_and_ablations_act_inside(model, vpd, tokens):
    with torch.no_grad(), vpd.attach(model) as attached:
        with attached.keep_only(KEPT):
            outer = model(tokens)
            with attached.masked("unmasked", delta=1.0):
                inner = model(tokens)
            with attached.ablated(f"{IN}:3"):
                less = model(tokens)
            assert torch.equal(model(tokens), outer)
        assert torch.equal(inner, model(tokens)) and not torch.equal(outer, inner)
        with attached.keep_only([k for k in KEPT if k != f"{IN}:3"]):
            assert_close(less, model(tokens), rtol=1e-12, atol=1e-12)


def test_one_name_or_a_subcomponent_will_do_and_what_does_not_exist_is_said(model, vpd, tokens):
    with torch.no_grad(), vpd.attach(model) as attached:
        results = []
        for form in (f"{IN}:0", [f"{IN}:0"], Subcomponent(IN, 0), [Subcomponent(IN, 0), f"{IN}:0"]):
            with attached.keep_only(form):
                results.append(model(tokens))
        assert all(torch.equal(r, results[0]) for r in results)
        for arguments, keywords, error, message in [
            (["blocks.1.mlp.W_ni:0"], {}, KeyError, r"did you mean 'blocks\.1\.mlp\.W_in'"),
            ([f"{IN}:6"], {}, IndexError, "6 subcomponents, 0 to 5"),
            ([IN], {}, ValueError, "give 'site:index'"),
            (KEPT, dict(rest="adverserial"), ValueError, r"did you mean 'adversarial'\?\): choose from 'zero'"),
            (KEPT, dict(rest="adversarial", delta=0.0), ValueError, "attacks Δ as well"),
            (KEPT, dict(delta="often"), ValueError, "give a number, 'drawn'"),
            (KEPT, dict(sites="blocks.1.mlp.W_ni"), KeyError, r"did you mean 'blocks\.1\.mlp\.W_in'"),
        ]:
            with pytest.raises(error, match=message), attached.keep_only(arguments, **keywords):
                pass
        with pytest.raises(IndexError, match="pos=9 is outside the 7 positions"), attached.keep_only(KEPT, pos=9):
            model(tokens)
    with pytest.raises(RuntimeError, match="detached"), attached.keep_only(KEPT):
        pass
