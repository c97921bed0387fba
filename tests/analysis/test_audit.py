"""Audits: against models ablated by hand, an adversary that can be worked out, and what each circuit is compared with."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.marks import needs_bridge
from tests.tiny import decomposition_of, some_tokens, tiny_model
from tl_vpd import bundled
from tl_vpd.adapters import adapt
from tl_vpd.analysis.audit import AuditConfig, RepairConfig, audit_circuit, repair_circuit
from tl_vpd.analysis.audit.ablate import AblatedModel, interpolated
from tl_vpd.analysis.audit.auditor import random_circuit
from tl_vpd.analysis.audit.node_set import HookSite, node_set_of
from tl_vpd.analysis.nodes import Node

Z0, Z1, M0, M1 = "blocks.0.attn.hook_z", "blocks.1.attn.hook_z", "blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"
QUICK = dict(controls=0, draws=2, budgets=(4,), restarts=2)


def metric(logits):
    return (logits[:, -1, 3] - logits[:, -1, 5]).mean()


def by_hand(model, tokens, kept, value=0.0):
    """The metric with every head and MLP but ``kept`` at a value, by TransformerLens's hooks."""

    def heads(z, hook):
        z = z.clone()
        for h in range(z.shape[2]):
            if f"{hook.name}:{h}" not in kept:
                z[:, :, h] = value[hook.name][:, :, h] if isinstance(value, dict) else value
        return z

    def whole(out, hook):
        return out if hook.name in kept else (value[hook.name] if isinstance(value, dict) else torch.zeros_like(out))

    hooks = [(Z0, heads), (Z1, heads), (M0, whole), (M1, whole)]
    with torch.no_grad():
        return float(metric(model.run_with_hooks(tokens, fwd_hooks=hooks)))


def clean_cache(model, tokens):
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    return {name: cache[name] for name in (Z0, Z1, M0, M1)}


def test_plain_ablations_are_those_by_hand(model, tokens):
    circuit = [f"{Z0}:1", f"{Z1}:0", M1]
    result = audit_circuit(
        None, model, tokens, circuit, metric, config=AuditConfig(ablations=["zero", "mean", "resample"], **QUICK)
    )
    cache = clean_cache(model, tokens)
    means = {name: activations.mean((0, 1), keepdim=True).expand_as(activations) for name, activations in cache.items()}
    other = {name: activations.flip(0) for name, activations in cache.items()}  # of two prompts the other
    everything = [f"{z}:{h}" for z in (Z0, Z1) for h in (0, 1)] + [M0, M1]
    rest = [name for name in everything if name not in circuit]
    for row, value in zip(result.rows.itertuples(), (0.0, means, other), strict=True):
        assert row.circuit == pytest.approx(by_hand(model, tokens, circuit, value), abs=1e-9)
        assert row.nothing == pytest.approx(by_hand(model, tokens, [], value), abs=1e-9)
        assert row.complement == pytest.approx(by_hand(model, tokens, rest, value), abs=1e-9)
        assert row.recovered == pytest.approx((row.circuit - row.nothing) / (result.whole - row.nothing))
    assert result.whole == pytest.approx(float(metric(model(tokens)).detach()), abs=1e-12)
    whole = audit_circuit(None, model, tokens, everything, metric, config=AuditConfig(**QUICK))
    assert whole.rows["circuit"].tolist() == pytest.approx([whole.whole] * 5, abs=1e-12)
    assert result.to_pandas().iloc[0]["ablation"] == "none" and len(result.to_pandas()) == 4
    assert result.value("mean") == result.rows["circuit"][1]


def test_the_adversary_is_at_least_as_bad_as_every_corner_when_the_metric_is_linear():
    """With one layer of heads and no norm the logits are linear in the sources, so the worst is a corner: try them all."""
    model, tokens = (
        tiny_model(n_layers=1, n_heads=4, d_head=2, attn_only=True, normalization_type=None, rotary_dim=2),
        some_tokens(),
    )
    result = audit_circuit(
        None, model, tokens, [f"{Z0}:0"], metric, config=AuditConfig(ablations=["stochastic", "adversarial"], **QUICK)
    )
    corners = [
        by_hand_one_layer(model, tokens, ["0", *(h for h, bit in zip("123", f"{i:03b}", strict=True) if bit == "1")])
        for i in range(8)
    ]
    assert result.value("adversarial") == pytest.approx(min(corners), abs=1e-9)
    assert min(corners) < result.value("stochastic") < max(corners)
    lower = audit_circuit(
        None,
        model,
        tokens,
        [f"{Z0}:0"],
        metric,
        config=AuditConfig(ablations=["adversarial"], lower_is_better=True, **QUICK),
    )
    assert lower.value("adversarial") == pytest.approx(max(corners), abs=1e-9)


def by_hand_one_layer(model, tokens, kept):
    def heads(z, hook):
        z = z.clone()
        for h in range(z.shape[2]):
            z[:, :, h] *= float(str(h) in kept)
        return z

    with torch.no_grad():
        return float(metric(model.run_with_hooks(tokens, fwd_hooks=[(Z0, heads)])))


def test_more_freedom_is_never_better_for_the_circuit(model, tokens):
    circuit = [f"{Z0}:1", M1]
    audit = audit_circuit(None, model, tokens, circuit, metric, config=AuditConfig(**{**QUICK, "budgets": (2, 8)}))
    zero = audit.value("zero")
    assert audit.value("adversarial", steps=2) <= zero and audit.value("adversarial", steps=8) <= zero
    wide = audit_circuit(
        None,
        model,
        tokens,
        circuit,
        metric,
        config=AuditConfig(ablations=["adversarial"], per_position=True, budgets=(8,), restarts=1, controls=0),
    )
    assert wide.worst[8].shape == (7, 6) and audit.worst[8].shape == (1, 6)
    assert wide.value("adversarial") <= zero
    assert list(audit.top(2)["node"]) == [audit.node_set.labels()[i] for i in audit.worst[8][0].topk(2).indices]
    again = audit_circuit(None, model, tokens, circuit, metric, config=AuditConfig(**{**QUICK, "budgets": (2, 8)}))
    assert again.rows.equals(audit.rows)


def test_what_the_worst_sources_give_is_what_is_reported(model, tokens):
    circuit = [f"{Z0}:1", M1]
    audit = audit_circuit(
        None, model, tokens, circuit, metric, config=AuditConfig(reference="mean", ablations=["adversarial"], **QUICK)
    )
    node_set = audit.node_set
    with AblatedModel(model, node_set, tokens, None) as run:
        values = run.references("mean", tokens, None, torch.Generator())
        kept = node_set.contains(audit.nodes, 7)
        m = torch.where(kept, 1.0, audit.worst[4])
        with torch.no_grad():
            assert float(metric(run.run(m[None], values))) == pytest.approx(audit.value("adversarial"), abs=1e-9)
        with torch.no_grad():
            assert_close(run.run(torch.ones_like(m)[None], values), run.clean(), rtol=0, atol=0)


def test_nodes_at_positions_keep_those_positions_alone(model, tokens):
    circuit = [f"{Z0}:1@2", f"{Z1}:0", f"{M0}@6"]
    result = audit_circuit(None, model, tokens, circuit, metric, config=AuditConfig(ablations=["zero"], **QUICK))

    def heads(z, hook):
        out = torch.zeros_like(z)
        if hook.name == Z0:
            out[:, 2, 1] = z[:, 2, 1]
        else:
            out[:, :, 0] = z[:, :, 0]
        return out

    def mlp(activations, hook):
        out = torch.zeros_like(activations)
        if hook.name == M0:
            out[:, 6] = activations[:, 6]
        return out

    with torch.no_grad():
        logits = model.run_with_hooks(tokens, fwd_hooks=[(Z0, heads), (Z1, heads), (M0, mlp), (M1, mlp)])
    assert result.value("zero") == pytest.approx(float(metric(logits)), abs=1e-9)


def test_residual_positions_and_neurons(model, tokens):
    result = audit_circuit(
        None,
        model,
        tokens,
        ["blocks.1.hook_resid_pre@6", "blocks.0.hook_resid_pre"],
        metric,
        config=AuditConfig(ablations=["zero"], **QUICK),
    )

    def only_last(resid, hook):
        out = torch.zeros_like(resid)
        out[:, 6] = resid[:, 6]
        return out

    with torch.no_grad():
        logits = model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_resid_pre", only_last)])
    assert result.value("zero") == pytest.approx(float(metric(logits)), abs=1e-9)
    neurons = audit_circuit(
        None,
        model,
        tokens,
        ["blocks.0.mlp.hook_post:3", f"{Z1}:0"],
        metric,
        config=AuditConfig(ablations=["zero"], **QUICK),
    )
    assert [(p.name, p.count) for p in neurons.node_set.hook_sites] == [
        (Z0, 2), ("blocks.0.mlp.hook_post", 12), (Z1, 2), (M1, 1)
    ]  # fmt: skip


def test_subcomponents_are_audited_as_masks_would(model, vpd, tokens):
    """Zero ablation is keeping these alone (Δ off); sources of 1 for all else give the model back."""
    circuit = ["blocks.0.attn.W_Q:1", "blocks.1.mlp.W_out:4", "blocks.1.attn.W_V:0", "blocks.0.mlp.W_in:2"]
    result = audit_circuit(vpd, model, tokens, circuit, metric, config=AuditConfig(**QUICK))
    with torch.no_grad(), vpd.attach(model) as attached, attached.keep_only(circuit):
        assert result.value("zero") == pytest.approx(float(metric(model(tokens))), abs=1e-9)
    acts = vpd.component_acts(model, tokens)
    rest = [str(c) for c in vpd.site_axis.subcomponents() if str(c) not in circuit]
    with torch.no_grad(), vpd.attach(model):
        hooks = vpd.ablation_hooks(rest, values=acts.mean()) + vpd.delta_hooks(0.0)
        assert result.value("mean") == pytest.approx(
            float(metric(model.run_with_hooks(tokens, fwd_hooks=hooks))), abs=1e-9
        )
    assert result.value("adversarial") <= result.value("zero")
    assert result.node_set.total == vpd.site_axis.total + len(vpd.sites)
    at = [f"{name}@6" for name in circuit]
    placed = audit_circuit(
        vpd, model, tokens, at, metric, config=AuditConfig(ablations=["zero", "adversarial"], **QUICK)
    )
    assert placed.worst[4].shape == (1, result.node_set.total)
    assert not hasattr(model.blocks[0], "hook_q_component_acts") and not any(
        p._forward_hooks for p in model.hook_dict.values()
    )


def test_controls_are_circuits_of_the_same_kinds():
    model = tiny_model(n_heads=4, d_head=2, rotary_dim=2)
    nodes = [Node.parse(n) for n in (f"{Z0}:1", f"{Z1}:0", f"{Z1}:3", M1)]
    node_set = node_set_of(adapt(model), nodes, None, None)
    kept = node_set.contains(nodes, 7)
    heads = [i for i, name in enumerate(node_set.labels()) if "hook_z" in name]
    mlps = [i for i, name in enumerate(node_set.labels()) if "mlp" in name]
    generator = torch.Generator().manual_seed(0)
    drawn = [random_circuit(node_set, kept, generator) for _ in range(20)]
    assert all(int(d[:, heads].sum()) == 3 and int(d[:, mlps].sum()) == 1 for d in drawn)
    assert len({tuple(d.flatten().tolist()) for d in drawn}) > 5
    result = audit_circuit(
        None, model, some_tokens(), nodes, metric, config=AuditConfig(ablations=["zero"], controls=3)
    )
    assert result.rows["random_best"][0] >= result.rows["random_mean"][0]


def test_a_repair_adds_until_the_adversary_no_longer_breaks_it():
    model, tokens = tiny_model(n_heads=4, d_head=2, rotary_dim=2), some_tokens()
    whole = float(metric(model(tokens)).detach())
    sign = whole > float(by_hand(model, tokens, []))
    fixed = repair_circuit(
        None,
        model,
        tokens,
        [f"{Z0}:0"],
        metric,
        config=RepairConfig(target=0.95, steps=6, max_added=12, lower_is_better=not sign),
    )
    assert fixed.holds and fixed.rows["recovered"].iloc[-1] >= 0.95
    assert (fixed.rows["recovered"].iloc[:-1] < 0.95).all()
    assert len(fixed.nodes) == 1 + len(fixed.added) == len(fixed.rows) and len(set(fixed.nodes)) == len(fixed.nodes)
    fresh = audit_circuit(
        None,
        model,
        tokens,
        fixed.nodes,
        metric,
        config=AuditConfig(ablations=["adversarial"], budgets=(20,), controls=0, seed=7, lower_is_better=not sign),
    )
    assert fresh.rows["recovered"][0] > 0.8
    wide = repair_circuit(
        None,
        model,
        tokens,
        [f"{Z0}:0"],
        metric,
        config=RepairConfig(steps=2, max_added=1, per_position=True, lower_is_better=not sign),
    )
    assert all(node.pos is None for node in wide.nodes)
    stopped = repair_circuit(
        None,
        model,
        tokens,
        [f"{Z0}:0"],
        metric,
        config=RepairConfig(target=1.0, steps=2, max_added=1, lower_is_better=not sign),
    )
    assert len(stopped.rows) == 2 and not stopped.holds and len(stopped.top(5)) == 1


@pytest.mark.parametrize(
    ("nodes", "error", "says"),
    [
        ([], ValueError, "nodes is empty"),
        ([f"{Z0}:9"], IndexError, "indices 0 to 1"),
        ([f"{M0}:1"], IndexError, "no indices"),
        ([f"{Z0}:0@9"], IndexError, "7 positions"),
        (["blocks.0.attn.hook_q:1"], KeyError, "cannot be audited"),
        (["blocks.7.attn.hook_z:1"], KeyError, "blocks 0 to 1"),
        ([M0, "blocks.0.mlp.hook_post:1"], ValueError, "is a part of"),
        ([f"{Z0}:1", "blocks.0.hook_attn_out"], ValueError, "is a part of"),
        ([f"{Z0}:1", "blocks.0.hook_resid_pre@1"], ValueError, "audit its positions without other nodes"),
        ([f"{Z0}:1", "blocks.0.attn.W_Q:1"], ValueError, "mixes subcomponents"),
    ],
)
def test_what_cannot_be_is_refused(model, vpd, tokens, nodes, error, says):
    with pytest.raises(error, match=says):
        audit_circuit(vpd, model, tokens, nodes, metric, config=AuditConfig(**QUICK))


def test_wrong_arguments_and_metrics_are_refused(model, tokens):
    for arguments, says in [
        (dict(ablations=["none"]), r"ablations\[0\]='none': choose"),
        (dict(reference="median"), "choose from 'zero', 'mean', 'resample'"),
        (dict(budgets=()), "give at least one"),
    ]:
        with pytest.raises(ValueError, match=says):
            audit_circuit(None, model, tokens, [f"{Z0}:0"], metric, config=AuditConfig(**arguments))
    with pytest.raises(ValueError, match="one number is needed"):
        audit_circuit(None, model, tokens, [f"{Z0}:0"], lambda logits: logits[:, -1, 3], config=AuditConfig(**QUICK))
    with pytest.raises(ValueError, match="cannot be differentiated"):
        audit_circuit(
            None, model, tokens, [f"{Z0}:0"], lambda logits: float(metric(logits).detach()), config=AuditConfig(**QUICK)
        )
    with pytest.raises(ValueError, match="resampling needs another"):
        audit_circuit(None, model, tokens[:1], [f"{Z0}:0"], metric, config=AuditConfig(ablations=["resample"], **QUICK))
    with pytest.raises(KeyError, match="Nothing audited matches"):
        audit_circuit(None, model, tokens, [f"{Z0}:0"], metric, config=AuditConfig(among="blocks.9.*", **QUICK))
    part = audit_circuit(
        None, model, tokens, [f"{Z0}:0"], metric, config=AuditConfig(among=["blocks.0.attn.*"], **QUICK)
    )
    assert part.node_set.labels() == [f"{Z0}:0", f"{Z0}:1"]
    assert not any(p._forward_hooks for p in model.hook_dict.values())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_interpolation_keeps_a_factor_of_1_to_the_bit():
    activations = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    hook_site = HookSite("z", "z", "head", 4)
    m = torch.tensor([1.0, 0.0, 0.25, 1.0])[None, None]
    out = interpolated(activations, torch.full((1, 1, 4, 5), 2.0), m, hook_site)
    assert torch.equal(out[:, :, [0, 3]], activations[:, :, [0, 3]]) and bool((out[:, :, 1] == 2).all())
    assert_close(out[:, :, 2], 2 + 0.25 * (activations[:, :, 2] - 2))
    flat = interpolated(activations.flatten(2), torch.full((1, 1, 20), 2.0), m, hook_site)
    assert torch.equal(flat, out.flatten(2))


@needs_bridge
def test_a_bridge_gives_the_hooked_transformers_audit():
    vpd, tokens = bundled.decomposition(), bundled.tokens("validation")[:2, :10]
    models = [bundled.model(kind=kind) for kind in ("hooked_transformer", "bridge")]
    heads = [f"{Z0}:1", f"{Z1}:0", M1]
    cases = [
        ([*heads[:2], "blocks.0.mlp.hook_post:3"], None),
        (["blocks.1.hook_resid_pre@9"], None),
        (["blocks.0.attn.W_Q:77", "blocks.0.attn.W_K:48"], vpd),
    ]

    def logit(logits):
        return logits[:, -1].log_softmax(-1)[:, 20].mean()

    for nodes, decomposition in cases:
        a, b = (
            audit_circuit(
                decomposition,
                m,
                tokens,
                nodes,
                logit,
                config=AuditConfig(ablations=["zero", "adversarial"], budgets=(1,), controls=0, restarts=1),
            )
            for m in models
        )
        assert a.whole == pytest.approx(b.whole, abs=1e-4)
        assert a.rows["circuit"].tolist() == pytest.approx(b.rows["circuit"].tolist(), abs=2e-2)


def test_padding_is_left_out_of_means(model, tokens):
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    result = audit_circuit(
        None,
        model,
        tokens,
        [f"{Z0}:0"],
        metric,
        config=AuditConfig(ablations=["mean"], controls=0),
        attention_mask=mask,
    )
    recorded = {}
    hooks = [(n, lambda x, hook: recorded.update({hook.name: x.detach()})) for n in (Z0, Z1, M0, M1)]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        model(tokens, attention_mask=mask)
    means = {n: activations[mask.bool()].mean(0).expand_as(activations) for n, activations in recorded.items()}

    def put(activations, hook):
        if hook.name != Z0:
            return means[hook.name]
        out = means[Z0].clone()
        out[:, :, 0] = activations[:, :, 0]
        return out

    with torch.no_grad(), model.hooks(fwd_hooks=[(n, put) for n in (Z0, Z1, M0, M1)]):
        assert result.value("mean") == pytest.approx(float(metric(model(tokens, attention_mask=mask))), abs=1e-9)


def test_the_decomposition_may_be_attached_already(model, vpd, tokens):
    circuit = ["blocks.0.attn.W_Q:1"]
    alone = audit_circuit(vpd, model, tokens, circuit, metric, config=AuditConfig(ablations=["zero"], controls=0))
    with vpd.attach(model):
        there = audit_circuit(vpd, model, tokens, circuit, metric, config=AuditConfig(ablations=["zero"], controls=0))
        heads = audit_circuit(
            None, model, tokens, [f"{Z0}:0"], metric, config=AuditConfig(ablations=["zero"], controls=0)
        )
    assert there.rows.equals(alone.rows)
    with vpd.attach(model) as attached, attached.masked("rounded"), pytest.raises(ValueError, match="runs masked here"):
        audit_circuit(vpd, model, tokens, circuit, metric, config=AuditConfig(ablations=["zero"], controls=0))
    assert heads.rows.equals(
        audit_circuit(None, model, tokens, [f"{Z0}:0"], metric, config=AuditConfig(ablations=["zero"], controls=0)).rows
    )
    with decomposition_of(model).double().attach(model), pytest.raises(ValueError, match="Another decomposition"):
        audit_circuit(vpd, model, tokens, circuit, metric, config=AuditConfig(ablations=["zero"], controls=0))


def test_resampled_values_are_never_those_of_padding(model):
    tokens = some_tokens(shape=(3, 6))
    mask = torch.ones_like(tokens)
    mask[0, 2:] = 0  # one short prompt, two long ones
    node_set = node_set_of(adapt(model), (Node.parse(f"{Z0}:1"),), None, None)
    with AblatedModel(model, node_set, tokens, mask.bool()) as ablated:
        for seed in range(5):
            rows = ablated._other_prompts(tokens, mask.bool(), torch.Generator().manual_seed(seed)).tolist()
            assert rows[0] in (1, 2) and rows[1] == 2 and rows[2] == 1
    with pytest.raises(ValueError, match=r"Prompts \[1\] have no other prompt of at least their length"):
        audit_circuit(
            None,
            model,
            tokens[:2],
            [f"{Z0}:1"],
            metric,
            config=AuditConfig(ablations=("resample",), **QUICK),
            attention_mask=mask[:2],
        )


def test_audits_work_in_inference_mode(model, tokens):
    expected = audit_circuit(None, model, tokens, [f"{Z0}:1"], metric, config=AuditConfig(**QUICK)).to_pandas()
    with torch.inference_mode():
        result = audit_circuit(
            None, model, tokens.clone(), [f"{Z0}:1"], metric, config=AuditConfig(**QUICK)
        ).to_pandas()
    assert_close(torch.tensor(result["circuit"]), torch.tensor(expected["circuit"]))
