"""Circuits in other tools' files, as those tools lay them out, read as addresses and audited."""

from __future__ import annotations

import json
import pickle

import pytest
import torch

from tests.tiny import some_tokens, tiny_model
from tl_vpd.adapters import adapt
from tl_vpd.analysis.audit import AuditConfig, audit_circuit
from tl_vpd.analysis.audit.edge_set import edge_set_of
from tl_vpd.analysis.graph import attribution_graph
from tl_vpd.formats import load_circuit, to_circuit_tracer

EAP = {
    "cfg": {"n_layers": 2, "n_heads": 2, "parallel_attn_mlp": False, "d_model": 8},
    "nodes": {
        "input": {"in_graph": True},
        "a0.h0": {"in_graph": False},
        "m1": {"in_graph": True},
        "logits": {"in_graph": True},
    },
    "edges": {
        "input->a0.h0<q>": {"score": -0.5, "in_graph": False},
        "input->m1": {"score": 0.25, "in_graph": True},
        "m1->logits": {"score": 0.125, "in_graph": True},
    },
}


def written(tmp_path, content, name="circuit.json"):
    path = tmp_path / name
    if path.suffix == ".json":
        path.write_text(json.dumps(content), encoding="utf-8")
    else:
        torch.save(content, path)
    return path


def names(circuit):
    return [str(address) for address in circuit]


def test_eap_ig_graphs_in_json(tmp_path):
    path = written(tmp_path, EAP)
    assert names(load_circuit(path)) == ["input->m1", "m1->logits"]
    assert names(load_circuit(path, top=2)) == ["input->a0.h0<q>", "input->m1"]
    circuit = load_circuit(path)
    tokens = some_tokens()
    config = AuditConfig(ablations=["zero"], controls=0)
    audit = audit_circuit(None, tiny_model(), tokens, circuit, lambda logits: logits[:, -1, 3].mean(), config=config)
    assert audit.nodes == circuit


def test_eap_ig_graphs_in_tensors(tmp_path):
    sources, targets = ["input", "a0.h0", "m0"], ["a0.h0<q>", "a0.h0<k>", "a0.h0<v>", "m0", "logits"]
    scores, marked = torch.zeros(3, 5), torch.zeros(3, 5, dtype=torch.bool)
    scores[0, 2], scores[1, 4], scores[2, 4] = -0.75, 0.5, 0.25
    marked[0, 2] = marked[1, 4] = True
    content = {
        "cfg": EAP["cfg"], "src_nodes": sources, "dst_nodes": targets,
        "edges_scores": scores, "edges_in_graph": marked, "nodes_in_graph": torch.ones(3, dtype=torch.bool),
    }  # fmt: skip
    path = written(tmp_path, content, "graph.pt")
    assert names(load_circuit(path)) == ["input->a0.h0<v>", "a0.h0->logits"]
    assert names(load_circuit(path, top=3)) == ["input->a0.h0<v>", "a0.h0->logits", "m0->logits"]
    with pytest.raises(ValueError, match="scores of shape"):
        load_circuit(written(tmp_path, {**content, "src_nodes": ["input"]}, "other.pt"))


@pytest.mark.parametrize("by_position", [False, True])
def test_auto_circuits_prune_scores(tmp_path, by_position):
    """Its sources are the residual start, then each block's heads and MLP; its masks are [(pos), (head), source]."""
    shapes = {f"blocks.0.hook_{r}_input": (2, 1) for r in "qkv"} | {"blocks.0.hook_mlp_in": (3,)}
    shapes |= {f"blocks.1.hook_{r}_input": (2, 4) for r in "qkv"} | {"blocks.1.hook_mlp_in": (6,)}
    shapes["blocks.1.hook_resid_post"] = (7,)
    scores = {name: torch.zeros(5, *shape) if by_position else torch.zeros(shape) for name, shape in shapes.items()}
    at = (2,) if by_position else ()
    scores["blocks.1.hook_k_input"][(*at, 1, 3)] = 1.0
    scores["blocks.1.hook_mlp_in"][(*at, 5)] = -2.0
    scores["blocks.1.hook_resid_post"][(*at, 0)] = 0.5
    path = written(tmp_path, scores, "scores.pt")
    pos = "@2" if by_position else ""
    edges = [f"m0->a1.h1<k>{pos}", f"a1.h1->m1{pos}", f"input->logits{pos}"]
    assert names(load_circuit(path)) == edges
    assert names(load_circuit(path, top=1)) == edges[1:2]
    every = {name: torch.ones(shape) for name, shape in shapes.items()}
    path = written(tmp_path, every, "every.pt")
    assert set(names(load_circuit(path, top=1000))) == set(edge_set_of(adapt(tiny_model())).labels())
    with pytest.raises(ValueError, match="marks none as the circuit: give top="):
        load_circuit(path)


def test_heads_whose_queries_keys_and_values_are_one(tmp_path):
    scores = {
        "blocks.0.hook_attn_in": torch.tensor([[1.0], [0.0]]),
        "blocks.0.hook_resid_post": torch.tensor([0.0, 1.0, 0.0]),
    }
    assert names(load_circuit(written(tmp_path, scores, "s.pt"))) == ["input->a0.h0", "a0.h0->logits"]


def test_lists_of_names_of_both_kinds(tmp_path):
    listed = ["Resid Start->A0.1.V", "A0.1->MLP 1", "MLP 1->Resid End", "A0.0->A1.1", "m0->a1.h1<q>", "input->logits"]
    assert names(load_circuit(written(tmp_path, listed))) == [
        "input->a0.h1<v>", "a0.h1->m1", "m1->logits", "a0.h0->a1.h1", "m0->a1.h1<q>", "input->logits"
    ]  # fmt: skip


def test_circuitkits_nodes(tmp_path):
    node = {"layer_idx": 1, "node_type": "attn_head", "index": 0, "importance": 0.25, "name": "L1H0"}
    mlp = {"layer_idx": 0, "node_type": "mlp_neuron", "index": 0, "importance": 0.75, "name": "L0M0"}
    edges = {"E0": {"src_id": "L0M0", "dst_id": "L1H0", "weight": 0.5, "attribution": "direct"}}
    artifact = {
        "version": "1.0",
        "metadata": {"granularity": "head"},
        "nodes": {"L1H0": node, "L0M0": mlp},
        "edges": edges,
    }
    path = written(tmp_path, artifact)
    assert names(load_circuit(path)) == ["blocks.1.attn.hook_z:0", "blocks.0.hook_mlp_out"]
    assert names(load_circuit(path, top=1)) == ["blocks.0.hook_mlp_out"]
    neurons = {**artifact, "metadata": {"granularity": "neuron"}, "nodes": {"L0M0": {**mlp, "index": 5}}}
    assert names(load_circuit(written(tmp_path, neurons))) == ["blocks.0.mlp.hook_post:5"]
    scores = {"task": "ioi", "node_scores": {"A0.1": 0.5, "MLP 1": -0.75, "L1.42": 0.25}}
    path = written(tmp_path, scores, "scores.json")
    assert names(load_circuit(path, top=3)) == [
        "blocks.1.hook_mlp_out",
        "blocks.0.attn.hook_z:1",
        "blocks.1.mlp.hook_post:42",
    ]
    with pytest.raises(ValueError, match="give top="):
        load_circuit(path)


def test_graphs_of_subcomponents_come_back(tmp_path, model, vpd, tokens):
    graph = attribution_graph(vpd, model, tokens[:1], targets=[3]).pruned(nodes=12)
    path = to_circuit_tracer(graph, tmp_path, slug="graph")
    circuit = load_circuit(path)
    inner = [i for i, kind in enumerate(graph.kind.tolist()) if 0 < kind < len(graph.names) - 1]
    assert names(circuit) == [f"{graph.names[graph.kind[i]]}:{graph.index[i]}@{graph.pos[i]}" for i in inner]
    first = max(inner, key=lambda i: float(graph.influence[i]))
    assert names(load_circuit(path, top=1)) == [
        f"{graph.names[graph.kind[first]]}:{graph.index[first]}@{graph.pos[first]}"
    ]


def test_circuit_tracers_graphs_give_latents(tmp_path):
    """Its ids are {layer}_{feature}_{pos}; ``feature`` is another number there; errors are 0_{layer}_{pos}."""
    kinds = {"3_42_5": "cross layer transcoder", "1_7_2": "cross layer transcoder", "0_3_2": "mlp reconstruction error"}
    kinds |= {"E_9_0": "embedding", "13_502_7": "logit"}
    nodes = [
        {
            "node_id": i,
            "feature": 999,
            "layer": i[0],
            "ctx_idx": int(i[-1]),
            "feature_type": kind,
            "clerp": "",
            "influence": x,
        }
        for (i, kind), x in zip(kinds.items(), (0.75, 0.25, 0.5, None, None), strict=True)
    ]
    path = written(tmp_path, {"metadata": {}, "qParams": {}, "nodes": nodes, "links": []})
    assert names(load_circuit(path)) == ["blocks.3.transcoder:42@5", "blocks.1.transcoder:7@2"]
    assert names(load_circuit(path, top=1)) == ["blocks.1.transcoder:7@2"]
    nodes[0]["node_id"] = "L3/42"
    with pytest.raises(ValueError, match=r"neither a subcomponent nor a latent of a layer\.$"):
        load_circuit(written(tmp_path, {"nodes": nodes, "links": []}))


def test_other_files_are_refused_in_a_sentence(tmp_path):
    pickled = tmp_path / "scores.pkl"
    pickled.write_bytes(pickle.dumps({"blocks.0.hook_mlp_in": torch.ones(2)}))
    (tmp_path / "cut.json").write_text('{"cfg": ', encoding="utf-8")
    (tmp_path / "cut.pt").write_bytes(b"PK")
    cases = [
        (pickled, "runs code when it is read"),
        (tmp_path / "cut.json", "is not JSON"),
        (tmp_path / "cut.pt", "not a whole file"),
        (written(tmp_path, {"a": 1}, "a.json"), "its keys are"),
        (written(tmp_path, 3, "b.json"), "it holds a int"),
        (written(tmp_path, ["a0->b1"], "c.json"), "is not an edge"),
        (written(tmp_path, {"node_scores": {"head": 1.0}}, "d.json"), "names no head"),
        (written(tmp_path, {**EAP, "edges": {"input->m0": {"score": 1.0}}}, "e.json"), "in_graph"),
        (written(tmp_path, {"blocks.0.hook_mlp_in": torch.ones(9)}, "f.pt"), r"shape \(9,\)"),
        (written(tmp_path, {"blocks.0.hook_mlp_in": torch.ones(1), "x": torch.ones(1)}, "g.pt"), "its keys are"),
    ]
    for path, says in cases:
        with pytest.raises(ValueError, match=rf"{says}.*\.$"):
            load_circuit(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_circuit(tmp_path / "none.json")
    with pytest.raises(ValueError, match="top=0"):
        load_circuit(pickled, top=0)
