"""The interactive graph: self-contained, escaped, and holding what it says it shows."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

pytest.importorskip("plotly")

from tests.analysis.test_graph_result import by_hand
from tests.viz.test_panel import addresses
from tl_vpd.analysis import HarvestConfig, Label, Labels, harvest
from tl_vpd.analysis.graph import LogitTarget, attribution_graph
from tl_vpd.viz.graphs import graph as picture


def data_of(panel):
    return json.loads(re.fullmatch(r"tlVpdGraph\(\"tlvpd-graph-\w+\", (\{.*\})\)", panel.scripts[0])[1])


def test_nodes_edges_and_hover_texts():
    graph = by_hand()
    data = data_of(picture(graph))
    assert data["labels"] == list(graph.labels)
    assert [e[2] for e in data["edges"]] == [-3, 2, -2, 1.5, 1, 1, -1, 0.5]
    assert data["y"][5] == 4 and data["x"][5] == 1 and data["y"][0] == 0
    assert data["names"][5] == graph.logits[0].text and any(name.startswith("0 W_in:") for name in data["names"])
    assert data["columns"][1].endswith("<br>1") and len(data["rows"]) == len(graph.names)
    about = data["about"][2]
    assert "−3 ← embed@1" in about and "−2 → blocks.0.mlp.W_in:9@1" in about and "importance 0.25" in about
    assert data["size"][5] == max(data["size"]) and data["color"][3] != data["color"][2]


def test_text_from_tokens_is_escaped_and_the_page_needs_no_network(tmp_path):
    graph = by_hand()
    evil = LogitTarget(3, 1, None, "</script><img src=x>", 0.5)
    panel = picture(dataclasses.replace(graph, logits=(evil,)))
    path = panel.save(tmp_path / "graph.html")
    text = path.read_text(encoding="utf-8")
    assert "</script><img" not in text and not addresses(text.partition("<script>")[0])
    assert panel.html == picture(dataclasses.replace(graph, logits=(evil,))).html


def test_a_models_graph_with_tokens_of_its_subcomponents(model, vpd, tokens):
    graph = attribution_graph(vpd, model, tokens[:1], 3)
    result = harvest(vpd, model, tokens, config=HarvestConfig(windows=1))
    panel = picture(graph, nodes=12, edges=30, harvest=result, title="Mine")
    data = data_of(panel)
    assert len(data["edges"]) == 30 and sum("blocks" in label for label in data["labels"]) == 12
    assert any("fires at" in about for about in data["about"]) and "12 of" in panel.body
    assert sorted((abs(e[2]) for e in data["edges"]), reverse=True) == [abs(e[2]) for e in data["edges"]]
    address = next(label for label in data["labels"] if "blocks" in label).partition("@")[0]
    labels = Labels({address: Label("digits <b>of</b> a year", "by hand")})
    labelled = data_of(picture(graph, nodes=12, edges=30, labels=labels))
    texts = dict(zip(labelled["labels"], labelled["about"], strict=True))
    assert all(("<br>digits &#60;b&#62;of" in about) == node.startswith(f"{address}@") for node, about in texts.items())


def test_mistakes_are_said():
    with pytest.raises(ValueError, match="nodes=0"):
        picture(by_hand(), nodes=0)
