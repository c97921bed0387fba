"""Pruned circuits: gradients against differences, masks against an edited model, adversaries, and what is reported."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.hooks.test_clean import assert_same, snapshot
from tests.marks import needs_bridge
from tests.matrix.models import build
from tests.tiny import decomposition_of, draw, some_tokens, tiny_model
from tl_vpd.analysis.nodes import Node
from tl_vpd.analysis.pruning import PruneConfig, ablate_nodes, prune, prune_sweep
from tl_vpd.analysis.pruning.attack import attack
from tl_vpd.analysis.pruning.attack import draw as draw_sources
from tl_vpd.analysis.pruning.behaviours import behaviour_of
from tl_vpd.analysis.pruning.masked import PromptModel
from tl_vpd.analysis.pruning.prune import _Pruning
from tl_vpd.analysis.pruning.recorded import Recorded, running
from tl_vpd.forward import MaskedModel
from tl_vpd.masking import Masks, SiteMask

FLAGS = [
    {},
    dict(normalization_type="RMS", gated_mlp=True, act_fn="silu", n_heads=4, n_key_value_heads=2),
    dict(attn_only=True),
]


def masks_of(vpd, mask, delta):
    by_site = vpd.site_axis.split_sites(mask)
    return Masks({n: SiteMask(by_site[n], delta[..., i]) for i, n in enumerate(vpd.site_axis.names)})


@pytest.mark.parametrize("flags", FLAGS)
def test_a_lean_pass_is_the_masked_pass_and_so_are_its_gradients(flags):
    model = tiny_model(**flags)
    vpd = decomposition_of(model).to(torch.float64)
    tokens, sites = some_tokens(shape=(1, 5)), len(vpd.sites)
    mask, delta = draw(3, 5, vpd.site_axis.total), draw(3, 5, sites, seed=1)
    wanted = mask.clone().requires_grad_(), delta.clone().requires_grad_()
    with MaskedModel(vpd, model) as masked_model:
        logits = masked_model.masked(tokens.expand(3, -1), masks_of(vpd, *wanted), constant_weights=True)[:, 2]
    (-logits.log_softmax(-1)[:, 4]).sum().backward()
    with PromptModel(vpd, model) as masked:
        behaviour = behaviour_of(masked.adapter, masked.clean(tokens)[0][0], 4, 2)
        found, run = masked.logits(tokens, mask, delta, 2, gradients=True)
        gradients = masked.gradients(behaviour.losses, found, run, (3, 5))
    assert_close(found.detach(), logits.detach(), rtol=1e-9, atol=1e-11)
    # The loss is taken in float32, as everywhere.
    for own, expected in zip(gradients, wanted, strict=True):
        assert_close(own, expected.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("wanted", [3, (3, 5), None])
def test_behaviours_by_hand(model, vpd, tokens, wanted):
    with PromptModel(vpd, model) as masked:
        clean = masked.clean(tokens[:1])[0][0]
        behaviour = behaviour_of(masked.adapter, clean, wanted, -2)
    other = clean[[0, 3]].detach()
    p, q = clean[-2].softmax(-1), other.softmax(-1)
    expected = {
        3: q[:, 3],
        (3, 5): q[:, 3] / (q[:, 3] + q[:, 5]),
        None: (-(p * (p.log() - q.log())).sum(-1)).exp(),
    }[wanted]
    assert behaviour.pos == 5
    assert_close(behaviour.probability(other).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", ["adversarial", "importances_only"])
def test_the_gradient_of_the_whole_loss(model, vpd, tokens, variant):
    """With no adversary's step the loss is a plain function of z: autograd through public masks gives the same."""
    config = PruneConfig(variant=variant, adversary_steps=0, p=0.7)
    with PromptModel(vpd, model) as masked:
        prompt = tokens[:1]
        logits, inputs = masked.clean(prompt)
        z = masked.weights.pre_sigmoid(inputs, None)[0].detach()
        behaviour = behaviour_of(masked.adapter, logits[0], 4, -1)
        pruning = _Pruning(masked, prompt, z, behaviour, torch.tensor([0.3, 2.0], dtype=z.dtype), config)
        found = pruning.gradient()
        pruning.generator.manual_seed(config.seed)
        sources = [draw_sources(pruning.importances(), len(vpd.sites), pruning.generator) for _ in range(2)]
    alive = z > 0
    own = z[alive].expand(2, -1).clone().requires_grad_()
    g = torch.zeros(2, *z.shape, dtype=z.dtype)
    g[:, alive] = own.clamp(0, 1)
    penalty = torch.where(own > 1, 1 + 0.01 * (own - 1), own).clamp_min(0).add(1e-12).pow(0.7).sum(-1) / 7
    if variant == "importances_only":
        sources = [(torch.zeros_like(g), torch.zeros(2, 7, len(vpd.sites), dtype=z.dtype))] * 2
    loss = (penalty * torch.tensor([0.3, 2.0], dtype=z.dtype)).sum()
    with MaskedModel(vpd, model) as masked_model:
        for r, delta in sources:
            out = masked_model.masked(
                prompt.expand(2, -1), masks_of(vpd, g + (1 - g) * r, delta), constant_weights=True
            )
            loss = loss - 0.5 * out[:, -1].log_softmax(-1)[:, 4].sum()
    loss.backward()
    inside = (own > 0) & (own < 1)
    assert inside.any() and (own > 1).any()
    assert_close(found[inside], own.grad[inside], rtol=1e-4, atol=1e-6)
    # Above 1 the masks are constant and only the leak of the minimality loss is left.
    slope = torch.tensor([0.3, 2.0], dtype=z.dtype)[:, None] * 0.7 * (1 + 0.01 * (own - 1)) ** -0.3 * 0.01 / 7
    assert_close(found[own > 1], slope[own > 1].detach(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("reach", ["alive", "alive_and_deltas", "everything"])
def test_an_attack_raises_the_loss_within_its_reach(model, vpd, tokens, reach):
    prompt = tokens[:1]
    with PromptModel(vpd, model) as masked, torch.no_grad():
        logits, inputs = masked.clean(prompt)
        z = masked.weights.pre_sigmoid(inputs, None)[0]
        alive, behaviour = z > 0.3, behaviour_of(masked.adapter, logits[0], 4, -1)
        g = (0.4 * z.clamp(0, 1)).expand(3, -1, -1)
        start = draw_sources(g, len(vpd.sites), torch.Generator().manual_seed(0))
        sources = attack(
            running(masked, prompt, behaviour), g, start, steps=20, step_size=0.1, reach=reach, alive=alive
        )
        losses = [
            behaviour.losses(masked.logits(prompt, g + (1 - g) * r, delta, 6)[0]) for r, delta in (start, sources)
        ]
    assert (losses[1] > losses[0] + 0.01).all()
    assert all(float(own.min()) >= 0 and float(own.max()) <= 1 for own in sources)
    moved, moved_delta = (bool((a != b).any()) for a, b in zip(sources, start, strict=True))
    assert moved and moved_delta == (reach != "alive")
    assert bool((sources[0] != start[0])[:, ~alive].any()) == (reach == "everything")


@pytest.mark.parametrize(
    "kind",
    ["HookedTransformer", pytest.param("bridge", marks=needs_bridge), pytest.param("native", marks=needs_bridge)],
)
def test_a_recording_gives_what_the_model_gives(kind):
    if kind == "HookedTransformer":
        model = tiny_model(normalization_type="RMS", gated_mlp=True, act_fn="silu", n_heads=4, n_key_value_heads=2)
    else:
        model = build("GPT-2", kind)
    vpd, tokens = decomposition_of(model).to(torch.float64), some_tokens(shape=(1, 5))
    with PromptModel(vpd, model) as masked:
        behaviour = behaviour_of(masked.adapter, masked.clean(tokens)[0][0], 4, -1)
        by_model, recorded = running(masked, tokens, behaviour), Recorded(masked, tokens, behaviour)
        for rows, seed in ((2, 0), (2, 1), (3, 2)):
            own = draw(rows, 5, vpd.site_axis.total, seed=seed), draw(rows, 5, len(vpd.sites), seed=seed + 9)
            for found, expected in zip(recorded(*own), by_model(*own), strict=True):
                assert_close(found, expected, rtol=1e-6, atol=1e-9)
                assert float(expected.abs().max()) > 1e-4
        assert len(recorded.made) == 2 and recorded.made[2] is not recorded.model


def test_what_cannot_be_recorded_is_run_with_a_warning(model, vpd, tokens):
    with PromptModel(vpd, model) as masked:
        behaviour = behaviour_of(masked.adapter, masked.clean(tokens[:1])[0][0], 4, -1)
        recorded = Recorded(masked, tokens[:1], behaviour)
        honest, calls = recorded.model, []

        def moody(mask, delta):
            calls.append(1)
            return tuple((2.0 if len(calls) == 1 else 1.0) * own for own in honest(mask, delta))

        recorded.model = moody
        own = draw(1, 7, vpd.site_axis.total), draw(1, 7, len(vpd.sites))
        with pytest.warns(RuntimeWarning, match="cannot be recorded .on other masks the recording is off by"):
            found = recorded(*own)
        assert_close(found[0], honest(*own)[0])


def test_pruning_from_recordings_is_the_same(model, vpd, tokens):
    config = PruneConfig(steps=4, lr=0.05, adversary_steps=2)
    a = prune(vpd, model, tokens[:1], 4, config=config, recorded=True)
    with torch.inference_mode():
        b = prune(vpd, model, tokens[:1].clone(), 4, config=config, recorded=False)
    assert_close(a.importances, b.importances, rtol=1e-5, atol=1e-6)


def test_pruning_keeps_the_behaviour_with_fewer_nodes(model, vpd, tokens):
    prompt = tokens[:1]
    before = snapshot(model)
    config = PruneConfig(steps=20, lr=0.15, adversary_steps=2)
    sweep = prune_sweep(vpd, model, prompt, 4, [0.001, 0.5, 20.0], config=config)
    table = sweep.table()
    assert table.nodes.is_monotonic_decreasing and table.nodes[2] < table.nodes[0] <= table.alive[0]
    g = vpd.causal_importances(model, prompt).concatenated[0]
    circuit = sweep.circuits[1]
    assert circuit.alive == int((g > 0).sum()) and not circuit.importances[g == 0].any()
    clean = float(model(prompt)[0, -1].softmax(-1)[4].detach())
    p = circuit.probabilities
    assert p["target"] == pytest.approx(clean, rel=1e-5)
    with torch.no_grad(), MaskedModel(vpd, model) as masked_model:
        zero = torch.zeros(1, 7, len(vpd.sites), dtype=torch.float64)
        plain = masked_model.masked(prompt, masks_of(vpd, circuit.importances[None], zero))[0, -1].softmax(-1)[4]
    assert p["importances"] == pytest.approx(float(plain), rel=1e-5) and p["adversarial_everything"] <= p["stochastic"]
    assert_same(before, snapshot(model))
    again = prune(vpd, model, prompt, 4, coefficient=0.5, config=config)
    assert again.behaviour == circuit.behaviour == "'4'" and again.coefficient == 0.5
    frame = circuit.to_pandas()
    assert len(frame) == len(circuit) == len(circuit.nodes) and frame.importance.between(0, 1).all()
    assert circuit.top(2).importance.tolist() == sorted(frame.importance, reverse=True)[:2]


def test_nodes_out_of_the_model_and_out_of_the_circuit(model, vpd, tokens):
    prompt = tokens[:1]
    circuit = prune(vpd, model, prompt, 4, config=PruneConfig(steps=3))
    nodes = [circuit.nodes[0], "blocks.1.mlp.W_out:2"]
    table = ablate_nodes(vpd, model, circuit, {"two": nodes, "none": []}, 4)
    assert table.group.tolist() == ["nothing", "two", "none"] and table.nodes.tolist() == [0, 8, 0]
    with torch.no_grad(), vpd.attach(model):
        one = vpd.ablation_hooks(str(nodes[0].subcomponent), pos=[nodes[0].pos])
        hooks = [*one, *vpd.ablation_hooks(nodes[1])]
        out = model.run_with_hooks(prompt, fwd_hooks=hooks)[0, -1].softmax(-1)[4]
    assert table.model[1] == pytest.approx(float(out), rel=1e-5)
    assert table.model[0] == table.model[2] == pytest.approx(circuit.probabilities["target"], rel=1e-5)
    assert table.circuit[0] == pytest.approx(circuit.probabilities["importances"], rel=1e-5)
    with pytest.raises(IndexError, match="outside the 7 positions"):
        ablate_nodes(vpd, model, circuit, {"x": [Node("blocks.0.attn.W_Q", 1, 9)]}, 4)


def test_mistakes_are_said(model, vpd, tokens):
    with pytest.raises(ValueError, match="one prompt without padding"):
        prune(vpd, model, tokens, 3)
    with pytest.raises(IndexError, match="Token 99 is outside"):
        prune(vpd, model, tokens[:1], 99)
    with pytest.raises(TypeError, match="is no behaviour"):
        prune(vpd, model, tokens[:1], [3])
    with pytest.raises(ValueError, match="variant='both'"):
        PruneConfig(variant="both")
    with pytest.raises(ValueError, match="reach='all'"):
        PruneConfig(reach="all")
