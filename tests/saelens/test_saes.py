"""SAEs of SAELens and a decomposition on one model. Run where SAELens is installed (``make test-others``)."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.tiny import decomposition_of, edited, options_of, tiny_model
from tl_vpd.analysis import AuditConfig, audit_circuit

sae_lens = pytest.importorskip("sae_lens")
WIDTHS = {
    "blocks.0.attn.hook_z": 8,
    "blocks.0.hook_resid_pre": 8,
    "blocks.1.hook_mlp_out": 8,
    "blocks.0.mlp.hook_post": 12,
    "blocks.1.mlp.hook_pre": 12,
}


def with_saes(model):
    """A HookedSAETransformer of the same weights."""
    other = sae_lens.HookedSAETransformer(model.cfg).double()
    other.load_state_dict(model.state_dict())
    return other


def sae_on(hook):
    from sae_lens.saes.sae import SAEMetadata

    config = sae_lens.StandardSAEConfig(
        d_in=WIDTHS[hook],
        d_sae=16,
        dtype="float64",
        reshape_activations="hook_z" if hook.endswith("hook_z") else "none",
        metadata=SAEMetadata(hook_name=hook),
    )
    sae = sae_lens.StandardSAE(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.4)
    return sae


@pytest.fixture
def plain():
    return tiny_model()


@pytest.fixture
def sae_model(plain):
    return with_saes(plain)


@pytest.mark.parametrize("mode", ["unmasked", "stochastic", "rounded", "ci", "adversarial", "zero"])
def test_modes_give_what_they_give_on_a_plain_model(plain, sae_model, vpd, tokens, mode):
    options = options_of(mode, seed=3, steps=3)
    with vpd.attach(plain) as attached, attached.masked(mode, **options):
        expected, cache = plain.run_with_cache(tokens)
    with vpd.attach(sae_model) as attached, attached.masked(mode, **options):
        logits, cache_again = sae_model.run_with_cache(tokens)
    assert torch.equal(logits, expected)
    assert torch.equal(cache["q_ci", 1], cache_again["q_ci", 1])


@pytest.mark.parametrize("hook", WIDTHS)
def test_an_sae_added_before_attaching_composes_with_masks(plain, sae_model, vpd, tokens, hook):
    sae_model.add_sae(sae_on(hook))
    clean = sae_model(tokens)
    zeros = {name: (torch.zeros(6).double(), 0.0) for name in vpd.sites}
    reference = with_saes(edited(plain, vpd, zeros))
    reference.add_sae(sae_on(hook))
    with vpd.attach(sae_model) as attached:
        logits, cache = sae_model.run_with_cache(tokens)
        assert torch.equal(logits, clean) and f"{hook}.hook_sae_acts_post" in cache
        with attached.masked("zero"):
            torch.testing.assert_close(sae_model(tokens), reference(tokens), rtol=1e-10, atol=1e-10)
            assert not torch.allclose(sae_model(tokens), clean)
    assert torch.equal(sae_model(tokens), clean)


def test_saes_where_no_tap_stands_come_and_go_while_attached(sae_model, vpd, tokens):
    with vpd.attach(sae_model) as attached:
        clean = sae_model(tokens)
        with attached.masked("rounded", threshold=0.1):
            masked = sae_model(tokens)
            inside = sae_model.run_with_saes(tokens, saes=[sae_on("blocks.0.hook_resid_pre")])
            assert torch.equal(sae_model(tokens), masked)
        assert not torch.allclose(inside, masked) and torch.equal(sae_model(tokens), clean)


@pytest.mark.parametrize("nodes", [["blocks.0.attn.W_Q:1", "blocks.1.mlp.W_in:2"], ["blocks.1.attn.hook_z:0"]])
def test_circuits_of_a_model_with_an_sae_and_a_decomposition_are_audited(sae_model, vpd, tokens, nodes):
    sae_model.add_sae(sae_on("blocks.0.hook_resid_pre"))

    def metric(logits):
        return logits[:, -1, 1].mean()

    whole = metric(sae_model(tokens)).item()
    ablations = ["zero", "mean", "resample", "stochastic", "adversarial"]
    config = AuditConfig(ablations=ablations, budgets=(2,), controls=0)
    decomposition = vpd if "W_" in nodes[0] else None
    alone = audit_circuit(decomposition, sae_model, tokens, nodes, metric, config=config).to_pandas()
    with vpd.attach(sae_model):
        attached = audit_circuit(decomposition, sae_model, tokens, nodes, metric, config=config).to_pandas()
    assert alone["circuit"][0] == pytest.approx(whole)
    for name in ("circuit", "complement", "nothing"):
        assert list(alone[name][1:]) == pytest.approx(list(attached[name][1:]))
    assert metric(sae_model(tokens)).item() == whole
    if decomposition is not None:  # zero: an edited model with the same SAE
        masks = {name: (torch.zeros(6).double(), 0.0) for name in vpd.sites}
        for site, c in (node.split(":") for node in nodes):
            masks[site][0][int(c)] = 1
        reference = with_saes(edited(tiny_model(), vpd, masks))
        reference.add_sae(sae_on("blocks.0.hook_resid_pre"))
        row = alone[alone["ablation"] == "zero"].iloc[0]
        assert row["circuit"] == pytest.approx(metric(reference(tokens)).item(), rel=1e-10)


@pytest.mark.parametrize("hook", ["blocks.0.attn.hook_z", "blocks.0.mlp.hook_post", "blocks.1.mlp.hook_pre"])
def test_an_sae_in_the_place_of_a_tapped_hook_is_refused_with_the_reason(sae_model, vpd, tokens, hook):
    message = f"{hook} was replaced by another module after it was tapped, as adding or removing an SAE does: detach"
    clean = sae_model(tokens)
    with vpd.attach(sae_model):
        sae_model.add_sae(sae_on(hook))
        with pytest.raises(RuntimeError, match=message):
            sae_model(tokens)
        sae_model.reset_saes()
        with pytest.raises(RuntimeError, match=message):  # SAELens puts a new HookPoint there
            sae_model(tokens)
    assert torch.equal(sae_model(tokens), clean)
    with vpd.attach(sae_model):
        assert torch.equal(sae_model(tokens), clean)


def test_importances_and_adversaries_need_no_attachment(plain, sae_model, vpd, tokens):
    assert torch.equal(
        vpd.causal_importances(sae_model, tokens).concatenated, vpd.causal_importances(plain, tokens).concatenated
    )
    masks, expected = (vpd.adversarial_masks(m, tokens, steps=2, seed=0) for m in (sae_model, plain))
    assert all(torch.equal(masks[name].mask, expected[name].mask) for name in vpd.sites)


def test_an_untrained_decomposition_of_such_a_model(sae_model):
    assert decomposition_of(sae_model).sites.keys() == decomposition_of(tiny_model()).sites.keys()


def test_copies_are_clean(sae_model, vpd, tokens):
    sae_model.add_sae(sae_on("blocks.0.attn.hook_z"))
    clean, names = sae_model(tokens), sae_model.hook_dict.keys()
    with vpd.attach(sae_model) as attached, attached.masked("zero"):
        other = copy.deepcopy(sae_model)
    assert torch.equal(other(tokens), clean) and other.hook_dict.keys() == names
