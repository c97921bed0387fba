"""The exported JSON against the schema of the viewers."""

from __future__ import annotations

import json
import re

import pytest

from tests.analysis.test_graph_result import EDGES, by_hand
from tl_vpd.analysis.graph import attribution_graph
from tl_vpd.formats import to_circuit_tracer

REQUIRED = {
    "metadata": {"slug": str, "scan": str, "prompt_tokens": list, "prompt": str},
    "node": {
        "node_id": str,
        "feature": int,
        "layer": str,
        "ctx_idx": int,
        "feature_type": str,
        "jsNodeId": str,
        "clerp": str,
    },
    "link": {"source": str, "target": str, "weight": float},
}


def check(content):
    """Raises where the content is not what the viewers read."""
    assert content.keys() == {"metadata", "qParams", "nodes", "links"}
    for kind, entries in (("metadata", [content["metadata"]]), ("node", content["nodes"]), ("link", content["links"])):
        for entry in entries:
            for key, expected in REQUIRED[kind].items():
                assert isinstance(entry[key], expected), (kind, key)
    ids = [node["node_id"] for node in content["nodes"]]
    assert len(set(ids)) == len(ids)
    assert all(link["source"] in ids and link["target"] in ids for link in content["links"])
    n = len(content["metadata"]["prompt_tokens"])
    top = max(int(node["layer"]) for node in content["nodes"] if node["layer"] != "E")
    for node in content["nodes"]:
        assert re.fullmatch(r"(E|\d+)_\d+_\d+", node["node_id"])
        layer, feature, pos = node["node_id"].split("_")
        assert (layer, int(feature), int(pos)) == (node["layer"], node["feature"], node["ctx_idx"]) and node[
            "ctx_idx"
        ] < n
        kind = node["feature_type"]
        assert kind == ("embedding" if layer == "E" else "logit" if int(layer) == top else "cross layer transcoder")
        assert kind != "logit" or re.search(r"\(p=\d\.\d+\)", node["clerp"])
        assert 0 <= node["influence"] <= 1


def test_the_graph_by_hand(tmp_path):
    graph = by_hand()
    content = json.loads(to_circuit_tracer(graph, tmp_path, slug="hand", scan="toy").read_text())
    check(content)
    assert [n["node_id"] for n in content["nodes"]] == ["E_7_0", "E_8_1", "0_4_1", "1_9_1", "2_0_1", "3_3_1"]
    assert [n["clerp"] for n in content["nodes"]][2:] == [
        "blocks.0.attn.W_O:4", "blocks.0.mlp.W_in:9", "blocks.0.mlp.W_out:0", 'Output "x" (p=0.500)',
    ]  # fmt: skip
    assert content["links"][1] == {"source": "E_8_1", "target": "0_4_1", "weight": EDGES[1][2]}
    assert content["metadata"]["prompt"] == "a</b>"
    # Cumulative from the largest: the logit comes first, the least influential node last at 1.
    order = graph.influence.argsort(descending=True).tolist()
    results = [content["nodes"][i]["influence"] for i in order]
    assert results == sorted(results) and results[-1] == pytest.approx(1)
    assert results[0] == pytest.approx(float(graph.influence.max() / graph.influence.sum()))


def test_the_list_of_graphs_grows_and_names_each_once(tmp_path):
    for slug in ("a", "b", "a"):
        to_circuit_tracer(by_hand(), tmp_path, slug=slug)
    listed = json.loads((tmp_path / "graph-metadata.json").read_text())
    assert [entry["slug"] for entry in listed["graphs"]] == ["b", "a"]
    (tmp_path / "graph-metadata.json").write_text("[]")
    with pytest.raises(ValueError, match="not a list of graphs"):
        to_circuit_tracer(by_hand(), tmp_path, slug="c")
    with pytest.raises(ValueError, match="make the name of a file"):
        to_circuit_tracer(by_hand(), tmp_path, slug="../c")


def test_a_models_graph(tmp_path, model, vpd, tokens):
    graph = attribution_graph(vpd, model, tokens[:1], [1, 2])
    check(json.loads(to_circuit_tracer(graph, tmp_path, slug="m").read_text()))
    with pytest.raises(ValueError, match="share a token and a position"):
        to_circuit_tracer(attribution_graph(vpd, model, tokens[:1], [1, (1, 2)]), tmp_path, slug="m")
    with pytest.raises(ValueError, match="the folder's list of graphs; choose another name"):
        to_circuit_tracer(by_hand(), tmp_path, slug="graph-metadata")
