"""Names that TransformerLens's tools find, what hooks see, and what is computed when nobody looks."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.testing import assert_close
from transformer_lens import patching
from transformer_lens.utils import get_act_name

from tests.tiny import options_of, some_tokens, tiny_model
from tl_vpd.forward import site_product
from tl_vpd.hooks import attached_to


def test_the_caches_short_names_and_shapes(model, vpd, tokens):
    with vpd.attach(model):
        _, cache = model.run_with_cache(tokens)
    assert cache["q_component_acts", 1].shape == cache["q_ci", 1].shape == cache["q_mask", 1].shape == (2, 7, 6)
    assert cache["q_delta_mask", 1].shape == (2, 7, 1)
    assert get_act_name("out_ci", 0) == vpd.sites["blocks.0.mlp.W_out"].hook_name("ci") == "blocks.0.hook_out_ci"
    assert torch.equal(cache["q_mask", 0], torch.ones(2, 7, 6, dtype=torch.float64))


def test_component_acts_are_x_at_v(model, vpd, tokens):
    with vpd.attach(model):
        _, cache = model.run_with_cache(tokens)
    z, post = cache["z", 1].flatten(2), cache["post", 1]
    assert_close(cache["o_component_acts", 1], z @ vpd.V["blocks.1.attn.W_O"].detach())
    assert_close(cache["out_component_acts", 1], post @ vpd.V["blocks.1.mlp.W_out"].detach())
    x = model.blocks[1].ln1(cache["resid_pre", 1])
    assert_close(cache["q_component_acts", 1], x @ vpd.V["blocks.1.attn.W_Q"].detach(), rtol=1e-7, atol=1e-7)


def test_a_names_filter_computes_what_it_names_and_no_more(model, vpd, tokens, monkeypatch):
    calls = []
    original = site_product.masked_output
    monkeypatch.setattr(site_product, "masked_output", lambda *a, **k: calls.append(1) or original(*a, **k))
    products = []
    gamma = vpd.gamma.forward
    monkeypatch.setattr(vpd.gamma, "forward", lambda *a, **k: products.append(1) or gamma(*a, **k))
    with torch.no_grad(), vpd.attach(model) as attached:
        model(tokens)
        model.run_with_cache(tokens, names_filter=lambda n: "component" not in n and not n.endswith(("_ci", "_mask")))
        assert (calls, products) == ([], [])
        model.run_with_cache(tokens, names_filter="blocks.1.hook_in_component_acts")
        assert (calls, products) == ([], [])  # acts that nobody changed need no second product
        model.run_with_cache(tokens, names_filter="blocks.1.hook_in_ci")
        assert (calls, products) == ([], [1])
        with attached.masked("zero", sites="blocks.1.mlp.W_in"):
            model(tokens)
        assert (len(calls), len(products)) == (1, 1)
        with attached.masked("rounded"):
            model(tokens)
        assert (len(calls), len(products)) == (1 + 12, 2)


def test_exposing_less_puts_up_less(model, vpd, tokens):
    plain = set(model.hook_dict)
    with vpd.attach(model, sites="blocks.1.attn.*", hooks=["mask"]):
        assert set(model.hook_dict) - plain == {f"blocks.1.hook_{s}_mask" for s in "qkvo"}
    with vpd.attach(model, sites=["blocks.0.mlp.W_in"], hooks="ci"):
        assert set(model.hook_dict) - plain == {"blocks.0.hook_in_ci"}
        _, cache = model.run_with_cache(tokens)
        assert_close(cache["in_ci", 0], vpd.causal_importances(model, tokens)["blocks.0.mlp.W_in"])


def test_patched_activations_move_the_output_along_u(model, vpd, tokens):
    site, amount = "blocks.1.mlp.W_out", 1.5
    clean, cache = model.run_with_cache(tokens)
    expected = cache["mlp_out", 1].clone()
    expected[:, 3] += amount * vpd.U[site][2].detach()

    def in_place(acts, hook):
        acts[:, 3, 2] += amount

    def returned(acts, hook):
        acts = acts.clone()
        acts[:, 3, 2] += amount
        return acts

    for grad in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        for hook in (in_place, returned):
            with grad(), vpd.attach(model) as attached:
                recorded = {}
                look = ("blocks.1.hook_mlp_out", lambda y, hook, recorded=recorded: recorded.update(y=y))
                hooks = [("blocks.1.hook_out_component_acts", hook), look]
                patched = model.run_with_hooks(tokens, fwd_hooks=hooks)
                assert_close(recorded["y"], expected)
                assert torch.equal(patched[:, :3], clean[:, :3]) and not torch.equal(patched[:, 3], clean[:, 3])
                with attached.masked("unmasked", delta=1.0):
                    assert_close(model.run_with_hooks(tokens, fwd_hooks=hooks), patched)


def test_a_patch_is_scaled_by_the_mask_and_leaves_delta_alone(model, vpd, tokens):
    site = "blocks.1.mlp.W_out"
    recorded = {}
    with torch.no_grad(), vpd.attach(model) as attached, attached.masked("unmasked", delta=0.25, sites=site):
        look = ("blocks.1.hook_mlp_out", lambda y, hook: recorded.update(y=y.clone()))
        model.run_with_hooks(tokens, fwd_hooks=[look])
        plain = recorded["y"]
        half = ("blocks.1.hook_out_mask", lambda m, hook: m * 0.5)
        model.run_with_hooks(tokens, fwd_hooks=[look, half])
        halved = recorded["y"]
        double = ("blocks.1.hook_out_component_acts", lambda a, hook: a * 2)
        model.run_with_hooks(tokens, fwd_hooks=[look, half, double])
        assert_close(recorded["y"], plain)
        assert not torch.equal(halved, plain)


def test_generic_activation_patch_over_layers_and_positions(model, vpd, tokens):
    other = some_tokens(seed=5)
    with torch.no_grad(), vpd.attach(model):
        _, corrupted = model.run_with_cache(other, names_filter=lambda n: n.endswith("hook_in_component_acts"))

        def metric(logits):
            return logits[0, -1, 3]

        def setter(acts, index, clean):
            pos = index[1]
            acts[:, pos] = clean[:, pos]
            return acts

        results = patching.generic_activation_patch(
            model, tokens, corrupted, metric, setter, "in_component_acts", ["layer", "pos"]
        )
        for layer, pos in ((0, 2), (1, 6)):
            donor = corrupted["in_component_acts", layer]

            def patch(acts, hook, donor=donor, pos=pos):
                return torch.cat([acts[:, :pos], donor[:, pos : pos + 1], acts[:, pos + 1 :]], dim=1)

            hook = (f"blocks.{layer}.hook_in_component_acts", patch)
            by_hand = metric(model.run_with_hooks(tokens, fwd_hooks=[hook]))
            assert_close(results[layer, pos].double(), by_hand, rtol=1e-6, atol=1e-6)
        assert results.shape == (2, 7)


def test_users_hooks_see_the_decomposed_value_and_may_change_it_before_or_after_attaching(model, vpd, tokens):
    V, U = (p["blocks.0.attn.W_Q"].detach() for p in (vpd.V, vpd.U))
    clean = model(tokens)
    recorded = []
    model.add_hook("blocks.0.attn.hook_q", lambda q, hook: recorded.append(q.clone()))
    with vpd.attach(model) as attached:
        model.add_hook("blocks.0.attn.hook_q", lambda q, hook: recorded.append(q.clone()))
        with torch.no_grad(), attached.masked("unmasked", sites="blocks.0.attn.W_Q"):
            _, cache = model.run_with_cache(tokens, names_filter=["blocks.0.hook_resid_pre", "blocks.0.attn.hook_q"])
            expected = (model.blocks[0].ln1(cache["resid_pre", 0]) @ V @ U + model.blocks[0].attn.b_Q.flatten()).view(
                2, 7, 2, 4
            )
            for value in (*recorded[-2:], cache["q", 0]):
                assert_close(value, expected, rtol=1e-7, atol=1e-7)
    recorded.clear()
    model(tokens)
    plain = recorded[0]
    with torch.no_grad(), vpd.attach(model) as attached, attached.masked("unmasked", sites="blocks.0.attn.W_Q"):
        undone = model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.attn.hook_q", lambda q, hook: plain)])
    assert torch.equal(undone, clean)


def test_a_site_reads_what_users_patched_into_its_input(model, vpd, tokens):
    with torch.no_grad(), vpd.attach(model):
        names = ["blocks.0.hook_o_component_acts", "blocks.0.attn.hook_z"]
        _, plain = model.run_with_cache(tokens, names_filter=names)
        model.add_hook("blocks.0.attn.hook_z", lambda z, hook: z * 3)
        _, cache = model.run_with_cache(tokens, names_filter=names)
        assert_close(cache["z", 0], 3 * plain["z", 0])
        assert_close(cache["o_component_acts", 0], 3 * plain["z", 0].flatten(2) @ vpd.V["blocks.0.attn.W_O"])


@pytest.mark.parametrize("where", ["component_acts", "mask", "delta_mask", "ci"])
def test_each_hook_point_fires_once_a_pass(model, vpd, tokens, where):
    fired = []
    hooks = [(s.hook_name(where), lambda t, hook: fired.append(hook.name)) for s in vpd.sites.values()]
    with vpd.attach(model) as attached:
        model.run_with_hooks(tokens, fwd_hooks=hooks)
        assert sorted(fired) == sorted(name for name, _ in hooks)
        for mode in ("stochastic", "adversarial", "zero"):
            fired.clear()
            with attached.masked(mode, **options_of(mode, steps=1)):
                model.run_with_hooks(tokens, fwd_hooks=hooks)
            assert sorted(fired) == sorted(name for name, _ in hooks), mode


def test_an_attachment_kept_by_no_variable_is_still_the_models(model, vpd, tokens):
    before = model(tokens)
    vpd.attach(model)
    gc.collect()
    attachment = attached_to(model)
    assert attachment is not None and attachment.decomposition is vpd
    assert len(vpd.ablation_hooks([f"{next(iter(vpd.sites))}:0"])) == 1
    attachment.detach()
    assert attached_to(model) is None and torch.equal(model(tokens), before)


def test_a_model_goes_away_with_what_is_attached_to_it(vpd):
    model = tiny_model()
    vpd.attach(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
