"""Circuits of transcoders' latents: against neurons, which latents can be made equal to, and against hooks."""

from __future__ import annotations

import pytest
import torch

from tests.baselines.test_transcoders import exact_transcoders, random_transcoders
from tests.tiny import decomposition_of, some_tokens, tiny_model
from tl_vpd.analysis.audit import AuditConfig, RepairConfig, audit_circuit, repair_circuit
from tl_vpd.analysis.audit.config import ABLATIONS


def metric(logits):
    return (logits[:, -1, 3] - logits[:, -1, 5]).mean()


def test_latents_that_are_neurons_give_the_audit_of_neurons(tokens):
    model, corrupted = tiny_model(act_fn="relu"), some_tokens(seed=1)
    circuit = ["blocks.0.{}:3", "blocks.0.{}:7@6", "blocks.1.{}:2", "blocks.1.{}:5"]
    tables, repairs = [], []
    for artefact, name in ((None, "mlp.hook_post"), (exact_transcoders(model), "transcoder")):
        nodes = [node.format(name) for node in circuit]
        config = AuditConfig(ablations=ABLATIONS, budgets=(3,), controls=1, draws=2, among=f"*.{name}")
        audit = audit_circuit(artefact, model, tokens, nodes, metric, config=config, reference_prompts=corrupted)
        tables.append(audit.to_pandas().drop(columns=["ablation", "reference"]).to_numpy(dtype=float))
        assert [str(node) for node in audit.nodes] == nodes and audit.node_set.total == 24
        config = RepairConfig(target=1.0, steps=2, max_added=1, restarts=1, candidates=2, among=f"*.{name}")
        repairs.append(repair_circuit(artefact, model, tokens, nodes, metric, config=config))
    torch.testing.assert_close(*map(torch.from_numpy, tables), rtol=1e-9, atol=1e-9, equal_nan=True)
    assert [str(node).replace("mlp.hook_post", "transcoder") for node in repairs[0].nodes] == [
        str(node) for node in repairs[1].nodes
    ]


@pytest.mark.parametrize("options", [{"cross_layer": True}, {"reads": "mlp_out"}, {"skip": True}])
def test_left_out_latents_are_taken_off_the_mlps_outputs(model, tokens, options):
    transcoders, kept, acts = random_transcoders(**options), {0: [1, 4], 1: [0]}, {}

    def off(layer):
        def hook(y, hook):
            x = y if "reads" in options else inputs[layer]
            acts[layer] = transcoders.encode(layer, x)
            for source in transcoders.sources(layer):
                rest = acts[source].index_fill(-1, torch.tensor(kept[source]), 0)
                y = y - rest @ transcoders[source].W_dec[transcoders.targets(source).index(layer)]
            return y

        return hook

    inputs = {}
    pre = [
        block.mlp.register_forward_pre_hook(lambda _, x, i=i: inputs.update({i: x[0]}))
        for i, block in enumerate(model.blocks)
    ]
    with torch.no_grad():
        expected = metric(
            model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{i}.hook_mlp_out", off(i)) for i in (0, 1)])
        )
        whole = metric(model(tokens))
    for handle in pre:
        handle.remove()
    nodes = [f"blocks.{layer}.transcoder:{i}" for layer, indices in kept.items() for i in indices]
    audit = audit_circuit(transcoders, model, tokens, nodes, metric, config=AuditConfig(ablations=["zero"], controls=0))
    assert audit.whole == pytest.approx(float(whole), abs=1e-12)
    assert audit.value("zero") == pytest.approx(float(expected), abs=1e-10) != audit.whole
    every = [f"blocks.{layer}.transcoder" for layer in (0, 1)]
    result = audit_circuit(
        transcoders, model, tokens, every, metric, config=AuditConfig(ablations=["zero"], controls=0)
    )
    assert result.value("zero") == result.whole
    with decomposition_of(model).double().attach(model):
        again = audit_circuit(
            transcoders, model, tokens, nodes, metric, config=AuditConfig(ablations=["zero"], controls=0)
        )
    assert again.value("zero") == audit.value("zero")


def test_latents_and_transcoders_that_do_not_fit_are_refused(model, tokens):
    transcoders, other = random_transcoders(), random_transcoders().float()
    for nodes, error, says in [
        (["blocks.0.transcoder:5"], IndexError, "indices 0 to 4"),
        (["blocks.2.transcoder:0"], KeyError, "not among what is audited"),
        (["blocks.0.attn.hook_z:1"], KeyError, "not among what is audited"),
        (["blocks.0.transcoder:1@7"], IndexError, "7 positions"),
    ]:
        with pytest.raises(error, match=says):
            audit_circuit(transcoders, model, tokens, nodes, metric)
    with pytest.raises(ValueError, match=r"use transcoders\.to"):
        audit_circuit(other, model, tokens, ["blocks.0.transcoder:1"], metric)
    assert not any(p._forward_hooks for p in model.hook_dict.values())
