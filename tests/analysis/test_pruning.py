"""Pruned circuits: gradients against public masks, masks against an edited model, adversaries, and what is reported."""

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
from tl_vpd.analysis.pruning.attack import attack, uniform_sources, within_reach
from tl_vpd.analysis.pruning.behaviours import behaviour_of
from tl_vpd.analysis.pruning.gradients import PromptLoss, RecordedGradient
from tl_vpd.analysis.pruning.importance_training import ImportanceTraining
from tl_vpd.forward import MaskedModel
from tl_vpd.masking import masks_from_sources

FLAGS = [
    {},
    dict(normalization_type="RMS", gated_mlp=True, act_fn="silu", n_heads=4, n_key_value_heads=2),
    dict(attn_only=True),
    dict(use_split_qkv_input=True, use_attn_result=True),
]


def loss_of(masked_model, tokens, behaviour, pos):
    """The loss of a behaviour on a prompt."""
    clean = masked_model.clean(tokens)[0][0]
    return PromptLoss(masked_model, tokens, behaviour_of(masked_model.adapter, clean, behaviour, pos))


@pytest.mark.parametrize("flags", FLAGS)
def test_gradients_in_importances_and_sources_are_those_through_public_masks(flags):
    model = tiny_model(**flags)
    vpd = decomposition_of(model).to(torch.float64)
    tokens, sites = some_tokens(shape=(1, 5)), len(vpd.sites)
    g, sources = draw(3, 5, vpd.site_axis.total), draw(3, 5, vpd.site_axis.total + sites, seed=1)
    leaves = g.clone().requires_grad_(), sources.clone().requires_grad_()
    with MaskedModel(vpd, model) as masked_model:
        masks = masks_from_sources(*leaves, vpd.site_axis)
        logits = masked_model.masked(tokens.expand(3, -1), masks, constant_weights=True)[:, 2]
        (-logits.log_softmax(-1)[:, 4]).sum().backward()
    with MaskedModel(vpd, model, fused_attention=True) as masked_model:
        loss = loss_of(masked_model, tokens, 4, 2)
        assert_close(loss.logits(g, sources).detach(), logits.detach(), rtol=1e-9, atol=1e-11)
        for variable, leaf in zip(("importances", "sources"), leaves, strict=True):
            assert_close(loss.gradient(variable, g, sources), leaf.grad, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("behaviour", [3, (3, 5), None])
def test_behaviours_by_hand(model, vpd, tokens, behaviour):
    with MaskedModel(vpd, model) as masked_model:
        clean = masked_model.clean(tokens[:1])[0][0]
        read = behaviour_of(masked_model.adapter, clean, behaviour, -2)
    other = clean[[0, 3]].detach()
    p, q = clean[-2].softmax(-1), other.softmax(-1)
    expected = {3: q[:, 3], (3, 5): q[:, 3] / (q[:, 3] + q[:, 5]), None: (-(p * (p.log() - q.log())).sum(-1)).exp()}[
        behaviour
    ]
    assert read.pos == 5
    assert_close(read.probability(other), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("variant", ["adversarial", "importances_only"])
def test_the_gradient_of_the_whole_loss(model, vpd, tokens, variant):
    """With no adversary's step the loss is a plain function of z: autograd through public masks gives the same."""
    config = PruneConfig(variant=variant, adversary_steps=0, p=0.7, recorded=False)
    prompt, strengths = tokens[:1], torch.tensor([0.3, 2.0], dtype=torch.float64)
    with MaskedModel(vpd, model) as masked_model:
        z = vpd.pre_sigmoid(masked_model.clean(prompt)[1], None)[0].detach()
        training = ImportanceTraining(loss_of(masked_model, prompt, 4, -1), z, strengths, config)
        gradient = training.gradient()
        training.generator.manual_seed(config.seed)
        sources = [uniform_sources(training.importances(), len(vpd.sites), training.generator) for _ in range(2)]
    alive = z > 0
    leaf = z[alive].expand(2, -1).clone().requires_grad_()
    g = torch.zeros(2, *z.shape, dtype=z.dtype)
    g[:, alive] = leaf.clamp(0, 1)
    penalty = torch.where(leaf > 1, 1 + 0.01 * (leaf - 1), leaf).clamp_min(0).add(1e-12).pow(0.7).sum(-1) / 7
    if variant == "importances_only":
        sources = [torch.zeros_like(sources[0])] * 2
    loss = (penalty * strengths).sum()
    with MaskedModel(vpd, model) as masked_model:
        for r in sources:
            masks = masks_from_sources(g, r, vpd.site_axis)
            out = masked_model.masked(prompt.expand(2, -1), masks, constant_weights=True)
            loss = loss - 0.5 * out[:, -1].log_softmax(-1)[:, 4].sum()
    loss.backward()
    inside = (leaf > 0) & (leaf < 1)
    assert inside.any() and (leaf > 1).any()
    assert_close(gradient[inside], leaf.grad[inside], rtol=1e-8, atol=1e-11)
    # Above 1 the masks are constant and only the leak of the minimality loss is left.
    slope = strengths[:, None] * 0.7 * (1 + 0.01 * (leaf - 1)) ** -0.3 * 0.01 / 7
    assert_close(gradient[leaf > 1], slope[leaf > 1].detach(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("reach", ["alive", "alive_and_deltas", "everything"])
def test_an_attack_raises_the_loss_within_its_reach(model, vpd, tokens, reach):
    prompt, sites = tokens[:1], len(vpd.sites)
    with MaskedModel(vpd, model) as masked_model, torch.no_grad():
        z = vpd.pre_sigmoid(masked_model.clean(prompt)[1], None)[0]
        loss, alive = loss_of(masked_model, prompt, 4, -1), z > 0.3
        g = (0.4 * z.clamp(0, 1)).expand(3, -1, -1)
        start = uniform_sources(g, sites, torch.Generator().manual_seed(0))
        reachable = within_reach(reach, alive, sites)
        sources = attack(loss.gradient, g, start, reachable, steps=20, step_size=0.1)
        losses = [loss.behaviour.losses(loss.logits(g, r)) for r in (start, sources)]
    assert (losses[1] > losses[0] + 0.01).all()
    assert float(sources.min()) >= 0 and float(sources.max()) <= 1
    moved = (sources != start).any(0)
    of_subcomponents, of_deltas = moved[:, :-sites], moved[:, -sites:]
    assert bool(of_subcomponents[alive].any()) and bool(of_deltas.any()) == (reach != "alive")
    assert bool(of_subcomponents[~alive].any()) == (reach == "everything")


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
    total = vpd.site_axis.total
    with MaskedModel(vpd, model, fused_attention=True) as masked_model:
        loss = loss_of(masked_model, tokens, 4, -1)
        recorded = RecordedGradient(loss)
        for rows, seed in ((1, 0), (2, 0), (2, 1), (3, 2)):
            g, sources = draw(rows, 5, total, seed=seed), draw(rows, 5, total + len(vpd.sites), seed=seed + 9)
            for variable in ("importances", "sources"):
                expected = loss.gradient(variable, g, sources)
                assert_close(recorded(variable, g, sources), expected, rtol=1e-6, atol=1e-9)
                assert float(expected.abs().max()) > 1e-4
        assert len(recorded.recordings) == 6 and loss.gradient not in recorded.recordings.values()


def test_what_cannot_be_recorded_is_run_with_a_warning(model, vpd, tokens):
    with MaskedModel(vpd, model) as masked_model:
        loss = loss_of(masked_model, tokens[:1], 4, -1)
        honest, calls = loss.gradient, []

        def moody(*arguments):
            calls.append(1)
            return (2.0 if len(calls) == 1 else 1.0) * honest(*arguments)

        loss.gradient = moody
        g, sources = draw(1, 7, vpd.site_axis.total), draw(1, 7, vpd.site_axis.total + len(vpd.sites))
        with pytest.warns(RuntimeWarning, match="Pruning runs the model in every pass.* is off by"):
            result = RecordedGradient(loss)("sources", g, sources)
        assert_close(result, honest("sources", g, sources))


def test_pruning_from_recordings_is_the_same(model, vpd, tokens):
    config = dict(steps=4, lr=0.05, adversary_steps=2)
    a = prune(vpd, model, tokens[:1], 4, config=PruneConfig(**config, recorded=True))
    with torch.inference_mode():
        b = prune(vpd, model, tokens[:1].clone(), 4, config=PruneConfig(**config, recorded=False))
    assert_close(a.importances, b.importances, rtol=1e-5, atol=1e-6)


def test_pruning_keeps_the_behaviour_with_fewer_nodes(model, vpd, tokens):
    prompt = tokens[:1]
    before = snapshot(model)
    config = PruneConfig(steps=20, lr=0.15, adversary_steps=2)
    sweep = prune_sweep(vpd, model, prompt, 4, [0.001, 0.5, 20.0], config=config)
    table = sweep.to_pandas()
    assert table.nodes.is_monotonic_decreasing and table.nodes[2] < table.nodes[0] <= table.alive[0]
    g = vpd.causal_importances(model, prompt).concatenated[0]
    circuit = sweep.circuits[1]
    assert circuit.alive == int((g > 0).sum()) and not circuit.importances[g == 0].any()
    clean = float(model(prompt)[0, -1].softmax(-1)[4].detach())
    p = circuit.probabilities
    assert p["target"] == pytest.approx(clean, rel=1e-5)
    with torch.no_grad(), MaskedModel(vpd, model) as masked_model:
        zero = torch.zeros(1, 7, vpd.site_axis.total + len(vpd.sites), dtype=torch.float64)
        masks = masks_from_sources(circuit.importances[None], zero, vpd.site_axis)
        plain = masked_model.masked(prompt, masks)[0, -1].softmax(-1)[4]
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
    with pytest.raises(TypeError, match="is not a behaviour"):
        prune(vpd, model, tokens[:1], [3])
    with pytest.raises(ValueError, match=r"\(3, 3\) is one token twice"):
        prune(vpd, model, tokens[:1], (3, 3))
    with pytest.raises(ValueError, match="variant='both'"):
        PruneConfig(variant="both")
    with pytest.raises(ValueError, match="reach='all'"):
        PruneConfig(reach="all")


def test_an_adversary_of_no_steps_is_not_reported(model, vpd, tokens):
    circuit = prune(vpd, model, tokens[:1], 3, config=PruneConfig(steps=1, adversary_steps=0))
    assert "adversarial" not in circuit.probabilities and "adversarial_fresh" in circuit.probabilities
