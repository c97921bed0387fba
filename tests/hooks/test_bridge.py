"""The bundled model as TransformerBridge and as HookedTransformer: one decomposition, the same numbers; and a clean leave."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.hooks.snapshots import assert_same
from tests.hooks.test_clean import Stop, stop
from tests.tiny import draw, options_of
from tl_vpd import bundled
from tl_vpd.forward import MaskedModel
from tl_vpd.hooks.attached import KINDS
from tl_vpd.masking import Masks, SiteMask
from tl_vpd.masking.modes import MODES

from .test_generate import generate

OUT = "blocks.1.mlp.W_out"


@pytest.fixture(scope="module")
def hooked():
    return bundled.model(kind="hooked_transformer")


@pytest.fixture(scope="module")
def vpd():
    return bundled.decomposition()


@pytest.fixture
def bridge():
    return bundled.model(kind="bridge")


@pytest.fixture(scope="module")
def tokens():
    return bundled.tokens("validation")[:2, :9]


def everything(bridge):
    """Every module of the bridge and of what it wraps, by name."""
    result = dict(bridge.named_modules())
    result.update({f"original.{k}": v for k, v in bridge.original_model.named_modules()})
    return result


def snapshot(bridge):
    """Everything about a bridge that a plugin could leave changed."""
    modules = everything(bridge)
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs",
             "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")  # fmt: skip
    return {
        "hook_dict": {k: id(v) for k, v in bridge.hook_dict.items()},
        "modules": {k: id(v) for k, v in modules.items()},
        "children": {k: list(m._modules) for k, m in modules.items()},
        "hooks": {k: tuple(tuple(getattr(m, h)) for h in hooks) for k, m in modules.items()},
        "users": {k: [h.user_hook for h in (*p.fwd_hooks, *p.bwd_hooks)] for k, p in bridge.hook_dict.items()},
        "training": {k: m.training for k, m in modules.items()},
        "attributes": {k: set(vars(m)) for k, m in modules.items()},
        "requires_grad": {k: p.requires_grad for k, p in bridge.named_parameters()},
        "state": {k: v.clone() for k, v in bridge.state_dict().items()},
        "grads": {k: None if p.grad is None else p.grad.clone() for k, p in bridge.named_parameters()},
    }


def test_importances_and_activations_are_the_hooked_transformers(hooked, bridge, vpd, tokens):
    a, b = (vpd.causal_importances(m, tokens) for m in (hooked, bridge))
    assert_close(a.concatenated, b.concatenated, rtol=0, atol=2e-5)
    assert bool((a.concatenated > 0).any())
    a, b = (vpd.component_acts(m, tokens) for m in (hooked, bridge))
    for n in vpd.sites:
        assert_close(a[n], b[n], rtol=1e-4, atol=1e-4, msg=n)


@pytest.mark.parametrize("mode", MODES)
def test_masked_logits_are_the_hooked_transformers(hooked, bridge, vpd, tokens, mode):
    results = []
    for model in (hooked, bridge):
        with torch.no_grad(), vpd.attach(model) as attached:
            clean = model(tokens)
            with attached.masked(mode, **options_of(mode, seed=3, steps=2, threshold=0.05)):
                results.append((clean, model(tokens)))
    (clean, masked), (of_bridge, masked_bridge) = results
    assert_close(of_bridge, clean, rtol=1e-4, atol=1e-4)
    if mode == "adversarial":  # signs of gradients near zero may differ in float32
        assert float((masked - masked_bridge).abs().mean()) < 0.05
    else:
        assert_close(masked_bridge, masked, rtol=1e-3, atol=2e-3)
    assert float((masked_bridge - of_bridge).abs().max()) > 0.05


def test_the_cache_shows_the_same_under_the_same_names(hooked, bridge, vpd, tokens):
    caches = []
    for model in (hooked, bridge):
        with torch.no_grad(), vpd.attach(model) as attached, attached.masked("rounded"):
            caches.append(model.run_with_cache(tokens)[1])
    for site in vpd.sites.values():
        for kind in KINDS:
            name = site.hook_name(kind)
            assert_close(caches[1][name], caches[0][name], rtol=1e-3, atol=1e-3, msg=name)
    assert caches[1]["q_ci", 1].shape == (2, 9, vpd.counts["blocks.1.attn.W_Q"])


def test_ones_change_no_bit_and_listening_neither(bridge, vpd, tokens):
    with torch.no_grad():
        clean = bridge(tokens)
        with vpd.attach(bridge) as attached:
            assert torch.equal(bridge(tokens), clean)
            assert torch.equal(bridge.run_with_cache(tokens)[0], clean)
            with attached.masked("unmasked", delta=1.0):
                assert torch.equal(bridge(tokens), clean)
        with MaskedModel(vpd, bridge) as masked_model:
            ones = Masks({n: SiteMask(torch.ones(c), torch.ones(())) for n, c in vpd.counts.items()})
            assert torch.equal(masked_model.masked(tokens, ones), clean)


def test_ablations_replacements_patches_and_kept_are_the_hooked_transformers(hooked, bridge, vpd, tokens):
    addresses = [f"{n}:{i}" for n in vpd.sites for i in (0, 7)]
    means = vpd.component_acts(hooked, tokens).mean()
    patch = ("blocks.0.hook_v_component_acts", lambda a, hook: a * 2)
    masks = {
        n: SiteMask(draw(2, 9, c, seed=i, dtype=torch.float32), None) for i, (n, c) in enumerate(vpd.counts.items())
    }
    results = []
    for model in (hooked, bridge):
        with torch.no_grad(), vpd.attach(model) as attached:
            hooked_results = [
                model.run_with_hooks(tokens, fwd_hooks=vpd.ablation_hooks(addresses, pos=[3, 4], amount=3.0)),
                model.run_with_hooks(tokens, fwd_hooks=vpd.ablation_hooks(addresses, values=means)),
                model.run_with_hooks(tokens, fwd_hooks=[patch]),
                model.run_with_hooks(tokens, fwd_hooks=vpd.mask_hooks(Masks(masks))),
                model.run_with_hooks(tokens, fwd_hooks=vpd.delta_hooks(0.0, pos=slice(2, 5))),
            ]
            with attached.keep_only(addresses):
                hooked_results.append(model(tokens))
            hooked_results.append(model(tokens))
            results.append(hooked_results)
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        assert_close(b, a, rtol=1e-3, atol=2e-3, msg=str(i))
        assert i == 6 or float((b - results[1][6]).abs().max()) > 1e-3


def test_gradients_of_v_and_u_are_the_hooked_transformers(hooked, bridge, vpd, tokens):
    results = []
    for model in (hooked, bridge):
        with vpd.attach(model) as attached, attached.masked("unmasked"):
            logits = model(tokens)
        results.append(
            torch.autograd.grad(logits.log_softmax(-1)[..., 5].mean(), [vpd.V[OUT], vpd.U["blocks.0.attn.W_K"]])
        )
    for a, b in zip(*results, strict=True):
        assert_close(a, b, rtol=1e-3, atol=1e-5)
        assert bool((a != 0).any())


def test_generation_is_the_hooked_transformers(hooked, bridge, vpd, tokens):
    results = []
    for model in (hooked, bridge):
        with torch.no_grad(), vpd.attach(model) as attached:
            with attached.masked("zero"):
                hooked_results = [generate(model, tokens[:1], return_type="tokens")]
            with attached.masked("rounded"):
                for cached in (False, True):
                    hooked_results.append(generate(model, tokens[:1], use_past_kv_cache=cached, return_type="tokens"))
            results.append(hooked_results)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_a_pass_that_stops_early_gives_activations_and_refuses_importances(bridge, vpd, tokens):
    with torch.no_grad(), vpd.attach(bridge):
        _, full = bridge.run_with_cache(tokens)
        with pytest.raises(ValueError, match=r"hook_ci needs every site's .* leave stop_at_layer out, or .*filter"):
            bridge.run_with_cache(tokens, stop_at_layer=1)
        _, cache = bridge.run_with_cache(tokens, stop_at_layer=1, names_filter=lambda n: n.endswith("component_acts"))
        assert set(cache) == {s.hook_name("component_acts") for s in vpd.sites.values() if s.layer == 0}
        for name, values in cache.items():
            assert torch.equal(values, full[name]), name
        assert torch.equal(bridge.run_with_cache(tokens)[1]["q_ci", 0], full["q_ci", 0])


def test_detaching_leaves_everything_as_it_was(bridge, vpd, tokens):
    bridge(tokens, return_type="loss").backward()
    bridge.add_hook("blocks.0.attn.hook_z", lambda z, hook: z * 0.5)
    bridge.blocks[1].mlp.eval()
    before, clean = snapshot(bridge), bridge(tokens)
    with vpd.attach(bridge) as attached:
        assert torch.equal(bridge(tokens), clean)
        for mode in MODES:
            with attached.masked(mode, **options_of(mode, seed=0, steps=1)):
                assert not torch.equal(bridge(tokens), clean)
        with attached.ablated(f"{OUT}:1"), attached.keep_only(f"{OUT}:2"):
            bridge.run_with_cache(tokens)
        vpd.causal_importances(bridge, tokens)
        bridge.add_hook("blocks.0.hook_q_ci", lambda g, hook: None)
        bridge(tokens)
    assert_same(before, snapshot(bridge))
    assert torch.equal(bridge(tokens), clean)


@pytest.mark.parametrize("mode", [None, "rounded", "adversarial"])
@pytest.mark.parametrize(
    "where", ["blocks.0.hook_k_component_acts", "blocks.1.hook_out_mask", "blocks.0.hook_v_ci", "blocks.1.attn.hook_z"]
)
def test_an_exception_in_the_middle_of_a_pass_poisons_nothing(bridge, vpd, tokens, where, mode):
    def run(hooks=()):
        with torch.no_grad():
            if mode is None:
                return bridge.run_with_hooks(tokens, fwd_hooks=list(hooks))
            with attached.masked(mode, **options_of(mode, seed=3, steps=1)):
                return bridge.run_with_hooks(tokens, fwd_hooks=list(hooks))

    bridge(tokens)  # the first pass makes TransformerLens add hooks
    before = snapshot(bridge)
    with vpd.attach(bridge) as attached:
        expected = run()
        with pytest.raises(Stop):
            run([(where, stop)])
        assert torch.equal(run(), expected)
    assert_same(before, snapshot(bridge))
    with pytest.raises(Stop), vpd.attach(bridge) as attached:
        run([(where, stop)])
    assert_same(before, snapshot(bridge))


def test_a_second_decomposition_is_refused_until_the_first_is_gone(bridge, vpd):
    with vpd.attach(bridge):
        for other in (vpd, bundled.decomposition()):
            with pytest.raises(ValueError, match="attached to this model already"):
                other.attach(bridge)
    vpd.attach(bridge).detach()


def test_compatibility_mode_that_processes_weights_after_attaching_is_refused_at_the_next_pass(bridge, vpd, tokens):
    """Folded weights are others than the decomposed ones."""
    with torch.no_grad():
        clean = bridge(tokens)
        attached = vpd.attach(bridge)
        bridge.enable_compatibility_mode(disable_warnings=True)
        for call in (bridge, bridge.run_with_hooks, bridge.run_with_cache):
            with pytest.raises(
                ValueError, match=r"since the decomposition was attached: .*no_processing=True"
            ) as refusal:
                call(tokens)
            assert "of 12 sites differ" in str(refusal.value.__cause__)
        attached.detach()
        folded = bridge(tokens)
        assert_close(folded.log_softmax(-1), clean.log_softmax(-1), rtol=1e-3, atol=1e-3)
        assert not {n for n in bridge.hook_dict if n.endswith("_component_acts")}
        assert torch.equal(bridge(tokens), folded)
    with pytest.raises(ValueError, match=r"sites differ.*enable_compatibility_mode"):
        vpd.attach(bridge)
    with torch.no_grad(), vpd.attach(bridge, check_weights=False) as attached, attached.masked("unmasked", delta=1.0):
        assert torch.equal(bridge(tokens), folded)


def test_compatibility_mode_without_processing_changes_nothing(hooked, bridge, vpd, tokens):
    with torch.no_grad():
        with vpd.attach(hooked) as attached, attached.masked("rounded"):
            expected = hooked(tokens)
        attached = vpd.attach(bridge)
        bridge.enable_compatibility_mode(disable_warnings=True, no_processing=True)
        for again in range(2):
            with attached.masked("rounded"):
                assert_close(bridge(tokens), expected, rtol=1e-3, atol=2e-3)
            assert {f"blocks.{i}.hook_q_ci" for i in range(2)} <= set(bridge.hook_dict)
            attached.detach()
            if again == 0:
                attached = vpd.attach(bridge)


def test_the_bridge_reads_strings_and_leaves_padding_out(hooked, bridge, vpd):
    prompts = ["def f(x):", "def longer(name, value):\n    return"]
    results = [vpd.causal_importances(m, prompts) for m in (hooked, bridge)]
    assert torch.equal(results[0].tokens, results[1].tokens)
    assert results[0].token_mask is not None and torch.equal(results[0].token_mask, results[1].token_mask)
    assert_close(results[0].concatenated, results[1].concatenated, rtol=0, atol=5e-5)
