"""What can be asked of a graph: tables, paths, influence, smaller graphs, files; on a graph small enough to count."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from tl_vpd.analysis.graph import AttributionGraph, GraphConfig, LogitTarget, attribution_graph
from tl_vpd.analysis.graph.paths import influence, strongest_paths

EDGES = [(0, 2, 1.0), (1, 2, -3.0), (0, 3, 2.0), (2, 3, -2.0), (2, 4, 0.5), (3, 4, 1.5), (1, 5, 1.0), (4, 5, -1.0)]


def by_hand() -> AttributionGraph:
    """Two tokens, three subcomponents, one logit: 0, 1 embeddings; 2, 3, 4 subcomponents; 5 the logit."""
    source, target, weight = (torch.tensor(column) for column in zip(*EDGES, strict=True))
    return AttributionGraph(
        tokens=torch.tensor([7, 8]),
        words=("a", "</b>"),
        names=("embed", "blocks.0.attn.W_O", "blocks.0.mlp.W_in", "blocks.0.mlp.W_out", "logits"),
        logits=(LogitTarget(3, 1, None, "x", 0.5),),
        kind=torch.tensor([0, 0, 1, 2, 3, 4]),
        index=torch.tensor([7, 8, 4, 9, 0, 3]),
        pos=torch.tensor([0, 1, 1, 1, 1, 1]),
        activation=torch.tensor([1.0, 1.0, 0.5, -2.0, 3.0, 4.0]),
        importance=torch.tensor([1.0, 1.0, 0.25, 1.0, 0.5, 1.0]),
        source=source.int(),
        target=target.int(),
        weight=weight,
        settings={"fixed": [], "importances": True, "min_weight": 0.0},
    )


def test_labels_and_tables():
    graph = by_hand()
    assert graph.labels == (
        "embed@0", "embed@1", "blocks.0.attn.W_O:4@1", "blocks.0.mlp.W_in:9@1", "blocks.0.mlp.W_out:0@1", "logits:3@1",
    )  # fmt: skip
    nodes = graph.nodes()
    assert nodes.token.tolist() == ["a", "</b>", "</b>", "</b>", "</b>", "x"] and nodes["index"].tolist() == [
        7,
        8,
        4,
        9,
        0,
        3,
    ]
    assert len(graph.to_pandas()) == len(EDGES) and [str(n) for n in graph.subcomponents()] == list(graph.labels[2:5])
    top = graph.top_edges(2)
    assert top.weight.tolist() == [-3.0, 2.0] and top.source.tolist() == ["embed@1", "embed@0"]
    assert graph.top_edges(1, target="logits:3@1").source.tolist() == ["embed@1"]
    assert graph.top_edges(9, source=2).weight.tolist() == [-2.0, 0.5]
    with pytest.raises(KeyError, match=r"did you mean 'blocks\.0\.attn\.W_O:4@1'"):
        graph.number("blocks.0.attn.W_O:4@2")
    with pytest.raises(IndexError, match="the graph has nodes 0 to 5"):
        graph.number(6)
    with pytest.raises(ValueError, match="fixed="):
        graph.sums()


def test_influence_and_paths_by_hand():
    graph = by_hand()
    # Shares: into 2 from 0: 1/4, from 1: 3/4; into 3 from 0, 2: 1/2 each; into 4 from 2: 1/4, from 3: 3/4; into 5 from 1, 4: 1/2.
    three, two = 0.5 * 0.75, 0.5 * 0.25 + 0.5 * 0.75 * 0.5
    expected = torch.tensor([two * 0.25 + three * 0.5, 0.5 + two * 0.75, two, three, 0.5, 1.0])
    assert_close(graph.influence, expected)
    paths = graph.paths(k=3)
    assert [p.numbers for p in paths] == [(1, 5), (0, 3, 4, 5), (1, 2, 3, 4, 5)]
    assert [p.strength for p in paths] == pytest.approx([0.5, 0.5 * 0.75 * 0.5, 0.5 * 0.75 * 0.5 * 0.75])
    assert paths[1].weights == (2.0, 1.5, -1.0) and paths[1].nodes[0] == "embed@0"
    assert [p.numbers for p in graph.paths("blocks.0.attn.W_O:4@1")] == [(1, 2), (0, 2)]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 30))
def test_the_strongest_paths_are_the_first_of_all(seed, k):
    generator = torch.Generator().manual_seed(seed)
    n = 7
    pairs = [(s, t) for s, t in itertools.combinations(range(n), 2) if float(torch.rand((), generator=generator)) < 0.6]
    pairs = pairs or [(0, n - 1)]
    source, target = (torch.tensor(names).int() for names in zip(*pairs, strict=True))
    weight = torch.randn(len(pairs), generator=generator, dtype=torch.float64)
    size = {t: sum(abs(float(w)) for (_, u), w in zip(pairs, weight, strict=True) if u == t) for t in range(n)}
    share = {pair: abs(float(w)) / size[pair[1]] for pair, w in zip(pairs, weight, strict=True)}

    def every(end):
        before = [s for s, t in pairs if t == end]
        if not before:
            return [((end,), 1.0)]
        return [((*path, end), x * share[path[-1], end]) for s in before for path, x in every(s)]

    expected = sorted((x for _, x in every(n - 1)), reverse=True)[:k]
    result = strongest_paths(source, target, weight, n - 1, k)
    assert [p.strength for p in result] == pytest.approx(expected)
    known = dict(every(n - 1))
    assert all(known[p.numbers] == pytest.approx(p.strength) for p in result) and len(
        {p.numbers for p in result}
    ) == len(result)
    start = torch.zeros(n, dtype=torch.float64)
    start[-1] = 1
    total = influence(source, target, weight, start)
    assert float(total[[not any(t == i for _, t in pairs) for i in range(n)]].sum()) == pytest.approx(1)


def test_smaller_graphs_keep_their_edges():
    graph = by_hand()
    sub = graph.subgraph(["blocks.0.mlp.W_in:9@1", 4])
    assert sub.labels == tuple(graph.labels[i] for i in (0, 1, 3, 4, 5))
    assert sub.to_pandas().values.tolist() == [
        r for r in graph.to_pandas().values.tolist() if "W_O:4" not in r[0] + r[1]
    ]
    assert graph.pruned(nodes=1).labels[2:3] == ("blocks.0.mlp.W_out:0@1",)
    assert (
        graph.pruned(min_weight=1.2).weight.tolist() == [-3.0, 2.0, -2.0, 1.5]
        and len(graph.pruned(min_weight=9.0)) == 6
    )


def test_networkx_has_the_same_graph():
    networkx = pytest.importorskip("networkx")
    graph = by_hand()
    result = graph.to_networkx()
    assert networkx.is_directed_acyclic_graph(result) and result.number_of_edges() == len(EDGES)
    assert result.edges["embed@1", "blocks.0.attn.W_O:4@1"]["weight"] == -3.0
    assert result.nodes["logits:3@1"]["token"] == "x" and result.nodes["embed@0"]["influence"] == pytest.approx(
        float(graph.influence[0])
    )


def test_a_graph_comes_back_from_its_files(tmp_path, model, vpd, tokens):
    graph = attribution_graph(
        vpd, model, tokens[:1], [1, (2, 3)], config=GraphConfig(fixed=("norms", "deltas"), importances=False)
    )
    again = AttributionGraph.load(graph.save(tmp_path / "graph"))
    assert again.labels == graph.labels and again.logits == graph.logits and again.settings == graph.settings
    for name in ("weight", "source", "target", "deltas", "biases", "activation", "tokens"):
        assert torch.equal(getattr(again, name), getattr(graph, name))
    with pytest.raises(FileNotFoundError, match=r"has no graph\.safetensors"):
        AttributionGraph.load(tmp_path)


def test_edges_of_weight_0_and_of_the_largest_weights_have_an_influence():
    graph = by_hand()
    into_logit = graph.target == 5
    nothing = replace(
        graph, weight=torch.where(into_logit, 0.0, graph.weight)
    )  # 0 of 0 is no share, and never dies out
    assert nothing.influence.tolist() == [0, 0, 0, 0, 0, 1]
    assert all(len(path.numbers) == 1 for path in nothing.paths(k=3))
    largest = replace(graph, weight=torch.where(into_logit, graph.weight.sign() * 3e38, graph.weight))
    assert largest.influence[[2, 3, 4]].isfinite().all() and float(largest.influence[4]) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shares_and_influence_of_half_precision_graphs_are_float32(dtype):
    graph = by_hand()
    half = replace(
        graph,
        weight=graph.weight.to(dtype),
        activation=graph.activation.to(dtype),
        logits=tuple(replace(t, probability=1e-13) for t in graph.logits),
    )
    assert half.influence.dtype == torch.float32 and bool(half.influence.isfinite().all())
    assert_close(half.influence, graph.influence)
    assert len(half.paths(k=2)) == 2
