"""Clustering: merges against the description length's definition, known groups, the null, results on a model."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import decomposition_of, some_tokens, tiny_model
from tl_vpd.analysis import (
    AuditConfig,
    DatasetGraphConfig,
    Node,
    attribution_graph,
    audit_circuit,
    dataset_graph,
)
from tl_vpd.analysis.clustering import (
    ClusterConfig,
    Clustering,
    Patterns,
    cluster,
    cluster_ensemble,
    component_edges,
    importance_patterns,
    overlaps,
    variation_of_information,
)
from tl_vpd.analysis.clustering.cluster import clustered
from tl_vpd.analysis.clustering.merging import description_length, merge
from tl_vpd.decomposition import Decomposition
from tl_vpd.site import ConcatenatedAxis

GREEDY = 60.0
"""So that the first of the ranked pairs is chosen."""


def important(n_tokens: int, n: int, density: float, seed: int) -> np.ndarray:
    """Random importances; everything is important somewhere."""
    generator = np.random.default_rng(seed)
    result = generator.random((n_tokens, n)) < density
    result[generator.integers(n_tokens, size=n), np.arange(n)] = True
    return result


def planted(n_groups: int, size: int, n_tokens: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Groups whose members are nearly always important together, and each subcomponent's group, in mixed order."""
    generator = np.random.default_rng(seed)
    groups = generator.random((n_tokens, n_groups)) < 0.05
    order = generator.permutation(np.repeat(np.arange(n_groups), size))
    result = groups[:, order] & (generator.random((n_tokens, len(order))) < 0.97)
    return result, order


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.integers(1, 150), st.floats(0.02, 0.9), st.floats(0, 3), st.integers(0, 99))
def test_every_round_has_the_length_of_its_partition(n: int, tokens: int, density: float, alpha: float, seed: int):
    matrix = important(tokens, n, density, seed)
    history = merge(scipy.sparse.csc_matrix(matrix), alpha=alpha, seed=seed)
    for merges in range(n):
        partition = history.partition(merges)
        assert len(np.unique(partition)) == n - merges
        assert description_length(matrix, partition, alpha) == pytest.approx(history.description_length[merges])
        if merges:
            first = history.pairs[merges - 1, 0]
            members = partition == partition[first]
            assert matrix[:, members].any(1).sum() == history.tokens[merges - 1]


@settings(max_examples=15, deadline=None)
@given(st.integers(3, 8), st.integers(0, 99), st.floats(0.01, 2))
def test_greedy_merges_are_the_best_of_all_pairs(n: int, seed: int, alpha: float):
    matrix = important(60, n, 0.3, seed)
    history = merge(scipy.sparse.csc_matrix(matrix), alpha=alpha, greed=GREEDY)
    partition = np.arange(n)
    for merges in range(n - 1):
        before = description_length(matrix, partition, alpha)
        changes = []
        for a, b in combinations(np.unique(partition), 2):
            changes.append(description_length(matrix, np.where(partition == b, a, partition), alpha) - before)
        assert history.best_change[merges] == pytest.approx(min(changes), abs=1e-9)
        after = history.description_length[merges + 1] - history.description_length[merges]
        assert after == pytest.approx(min(changes), abs=1e-9)
        partition = history.partition(merges + 1)


def test_ranks_follow_the_geometric_distribution():
    # Three pairs in the first round, of different change: each is chosen as often as its rank says.
    matrix = np.zeros((40, 3), dtype=bool)
    matrix[:10, 0], matrix[:12, 1], matrix[8:30, 2] = True, True, True
    columns = scipy.sparse.csc_matrix(matrix)
    changes = {}
    for a, b in combinations(range(3), 2):
        changes[a, b] = description_length(matrix, np.array([0, 1, 2])[[a if i == b else i for i in range(3)]], 0.5)
    ranked = sorted(changes, key=lambda pair: changes[pair])
    first = [tuple(merge(columns, alpha=0.5, greed=0.7, seed=seed).pairs[0]) for seed in range(600)]
    shares = [first.count(pair) / 600 for pair in ranked]
    p = 1 - np.exp(-0.7)
    assert shares == pytest.approx([p, p * (1 - p), (1 - p) ** 2], abs=0.06)  # the last gets all further ranks


@pytest.mark.parametrize("by_word", [True, False])
def test_both_ways_to_count_agree(by_word: bool, monkeypatch: pytest.MonkeyPatch):
    matrix = important(700, 25, 0.2, seed=3)
    expected = merge(scipy.sparse.csc_matrix(matrix), alpha=0.4)
    monkeypatch.setattr(overlaps, "_PER_WORD", 0.0 if by_word else 1e9)
    other = merge(scipy.sparse.csc_matrix(matrix), alpha=0.4)
    assert (other.pairs == expected.pairs).all()
    assert (other.description_length == expected.description_length).all()


def test_bits_are_counted_without_numpy_2(monkeypatch: pytest.MonkeyPatch):
    words = np.array([[0, 1, 2**64 - 1], [5, 2**63, 0]], dtype=np.uint64)
    monkeypatch.delattr(np, "bitwise_count", raising=False)
    assert overlaps.ones(words).tolist() == [65, 3]


def test_known_groups_are_found_and_none_in_shuffled_importances():
    matrix, groups = planted(n_groups=8, size=4)
    axis = ConcatenatedAxis({"blocks.0.mlp.W_in": 20, "blocks.0.mlp.W_out": 12})
    patterns = Patterns(scipy.sparse.csc_matrix(matrix), np.arange(32), axis, 0.01, np.array([400]))
    clustering = clustered(patterns, ClusterConfig(alpha=2.0, greed=GREEDY))
    assert variation_of_information(clustering.partition, groups) == 0
    assert [len(c.members) for c in clustering] == [4] * 8
    assert [c.tokens for c in clustering] == sorted((c.tokens for c in clustering), reverse=True)
    null = clustered(patterns.shuffled(), ClusterConfig(alpha=2.0, greed=GREEDY))
    assert max(len(c.members) for c in null) < 3
    assert (np.diff(patterns.shuffled().important.indptr) == matrix.sum(0)).all()


def events(matrix: np.ndarray, offsets: np.ndarray, lengths: list[int], members: np.ndarray) -> set[tuple[int, int]]:
    """(row, place) of a group's events, from the definition."""
    row = np.repeat(np.arange(len(lengths)), lengths)
    pos = np.concatenate([np.arange(n) for n in lengths])
    return {
        (int(row[t]), int(pos[t] + offsets[c]))
        for c in members.nonzero()[0]
        for t in matrix[:, c].nonzero()[0].tolist()
    }


def lagged_length(matrix, partition, offsets, lengths, alpha: float) -> float:
    groups = np.unique(partition)
    sizes = [(len(events(matrix, offsets, lengths, partition == g)), (partition == g).sum()) for g in groups]
    return sum(n * (np.log2(len(groups)) + alpha * rank) for n, rank in sizes)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(2, 7),
    st.integers(1, 3),
    st.integers(0, 99),
    st.sampled_from([[30], [9, 1, 14], [40, 27]]),
    st.floats(0, 2),
)
def test_merges_over_lags_have_the_length_of_their_events(
    n: int, lags: int, seed: int, lengths: list[int], alpha: float
):
    matrix = important(sum(lengths), n, 0.15, seed)
    history = merge(scipy.sparse.csc_matrix(matrix), alpha=alpha, seed=seed, lags=lags, lengths=np.array(lengths))
    for merges in range(n):
        partition, offsets = history.partition(merges), history.offsets(merges)
        assert offsets.min() == 0 and offsets.max() <= lags
        expected = lagged_length(matrix, partition, offsets, lengths, alpha)
        assert expected == pytest.approx(history.description_length[merges])
        if merges:
            members = partition == partition[history.pairs[merges - 1, 0]]
            assert len(events(matrix, offsets, lengths, members)) == history.tokens[merges - 1]


@settings(max_examples=8, deadline=None)
@given(st.integers(3, 5), st.integers(0, 99))
def test_greedy_merges_over_lags_are_the_best_of_all_pairs_and_lags(n: int, seed: int):
    lengths, lags, alpha = [30, 25], 2, 0.3
    matrix = important(55, n, 0.2, seed)
    history = merge(scipy.sparse.csc_matrix(matrix), alpha=alpha, greed=GREEDY, lags=lags, lengths=np.array(lengths))
    for merges in range(n - 1):
        partition, offsets = history.partition(merges), history.offsets(merges)
        before, changes = lagged_length(matrix, partition, offsets, lengths, alpha), []
        for a, b in combinations(np.unique(partition), 2):
            for lag in range(-lags, lags + 1):
                moved = offsets + np.where(partition == a, max(lag, 0), 0) + np.where(partition == b, max(-lag, 0), 0)
                if moved.max() <= lags:
                    joined = np.where(partition == b, a, partition)
                    changes.append(lagged_length(matrix, joined, moved, lengths, alpha) - before)
        assert history.best_change[merges] == pytest.approx(min(changes), abs=1e-9)


def test_groups_over_positions_need_lags():
    # Members of a group fire 0, 1 and 2 tokens after each other, like a query and the key of the token before.
    generator = np.random.default_rng(0)
    lengths, groups = np.array([40] * 30), 6
    starts = generator.random((30, 40, groups)) < 0.03
    starts[:, -2:] = False
    matrix = np.stack([np.roll(starts[..., c // 3], c % 3, axis=1).reshape(-1) for c in range(18)], axis=1)
    axis = ConcatenatedAxis({"blocks.0.attn.W_Q": 9, "blocks.0.attn.W_K": 9})
    patterns = Patterns(scipy.sparse.csc_matrix(matrix), np.arange(18), axis, 0.01, lengths)
    config = ClusterConfig(alpha=2.0, greed=GREEDY)
    with_lags = clustered(patterns, replace(config, lags=2))
    assert variation_of_information(with_lags.partition, np.arange(18) // 3) == 0
    assert all(component.lags == (2, 1, 0) for component in with_lags)
    assert with_lags[0].nodes(1) == [Node(c.site, c.index, i - 1) for i, c in enumerate(with_lags[0]) if i]
    assert max(len(c) for c in clustered(patterns, config)) == 1
    assert max(len(c) for c in clustered(patterns.shuffled(), replace(config, lags=2))) < 3


def test_importances_of_a_component_over_positions(target):
    model, decomposition, tokens = target
    clustering = cluster(decomposition, model, tokens, config=ClusterConfig(alpha=0.2, lags=2))
    assert any(any(c.lags) for c in clustering)
    ci = decomposition.causal_importances(model, tokens)
    largest = clustering.importances(ci)
    for component in clustering:
        expected = torch.zeros(6, 10)
        for member, lag in zip(component, component.lags, strict=True):
            g = ci[member.site][..., member.index]
            expected[:, lag:] = expected[:, lag:].maximum(g[:, : 10 - lag])
        assert torch.equal(largest[..., component.number], expected)
    again = Clustering.load(clustering.save(Path(tempfile.mkdtemp()) / "c.json"), decomposition)
    assert again.components == clustering.components


def test_distance_of_partitions_by_hand():
    assert variation_of_information([0, 0, 1, 1], [5, 5, 2, 2]) == 0
    assert variation_of_information([0, 0, 0, 0], [0, 0, 1, 1]) == pytest.approx(1)
    assert variation_of_information([0, 1, 0, 1], [0, 0, 1, 1]) == pytest.approx(2)
    with pytest.raises(ValueError, match="same things"):
        variation_of_information([0, 1], [0, 1, 2])


@pytest.fixture(scope="module")
def target():
    model = tiny_model(torch.float32)
    return model, decomposition_of(model), some_tokens(1, (6, 10))


@pytest.fixture(scope="module")
def clustering(target) -> Clustering:
    model, decomposition, tokens = target
    return cluster(decomposition, model, tokens, config=ClusterConfig(alpha=0.2))


def test_patterns_are_where_importances_are(target):
    model, decomposition, tokens = target
    mask = torch.ones_like(tokens)
    mask[:3, 7:] = 0
    ci = decomposition.causal_importances(model, tokens, attention_mask=mask)
    patterns = importance_patterns(decomposition, model, tokens, attention_mask=mask, batch_size=4)
    expected = (ci.concatenated > 0.01)[mask.bool()].numpy()
    assert patterns.n_tokens == 51
    assert (patterns.important.toarray() == expected[:, patterns.chosen]).all()
    assert not np.delete(expected, patterns.chosen, axis=1).any()


def test_components_on_a_model(target, clustering: Clustering):
    model, decomposition, tokens = target
    ci = decomposition.causal_importances(model, tokens)
    largest = clustering.importances(ci)
    for component in clustering:
        expected = torch.stack([ci[m.site][..., m.index] for m in component.members]).amax(0)
        assert torch.equal(largest[..., component.number], expected)
        assert int((expected > 0.01).sum()) == component.tokens
        assert clustering.of(component.members[-1]) == component
    several = max(clustering, key=lambda c: len(c.members))
    with decomposition.attach(model) as attached:
        with attached.ablated(several):
            together = model(tokens)
        with attached.ablated([str(m) for m in several.members]):
            assert torch.equal(model(tokens), together)
        with attached.keep_only(several):
            alone = model(tokens)
        with attached.keep_only([str(m) for m in several.members]):
            assert torch.equal(model(tokens), alone)
    metric = lambda logits: logits[:, -1].std()  # noqa: E731
    config = AuditConfig(ablations=("zero",), controls=0)
    audits = [audit_circuit(decomposition, model, tokens, m, metric, config=config) for m in (several, several.members)]
    assert audits[0].value("zero") == audits[1].value("zero")
    table = clustering.to_pandas()
    assert table.members.sum() == len(clustering.chosen)
    assert clustering.top(1).component.item() == several.number
    assert len(clustering.at(0)) == len(clustering.chosen)
    assert len(clustering.at(len(clustering.chosen) - 1)) == 1


def test_files(target, clustering: Clustering, tmp_path):
    _, decomposition, _ = target
    path = clustering.save(tmp_path / "components.json")
    again = Clustering.load(path, decomposition)
    assert again.components == clustering.components
    assert (again.history.description_length == clustering.history.description_length).all()
    content = json.loads(path.read_text())
    pairs = content["pairs"]
    wrongs = [
        {"format": 2},
        {"sites": {}},
        {"merges": 10**6},
        {"chosen": [0]},
        {"pairs": "x"},
        {"tokens": None},
        {"x": 1},
    ]
    for wrong in [*wrongs, {"pairs": [*pairs[:-1], pairs[0]]}, {"best_change": [*content["best_change"], 0.0]}]:
        path.write_text(json.dumps(content | wrong))
        with pytest.raises(ValueError, match=r"whole clustering|of a decomposition"):
            Clustering.load(path, decomposition)


def test_components_of_another_decomposition_of_this_shape_are_refused(target, clustering: Clustering, tmp_path):
    model, decomposition, tokens = target
    other = decomposition_of(model, seed=1)
    path = clustering.save(tmp_path / "components.json")
    with pytest.raises(ValueError, match="of another decomposition"):
        Clustering.load(path, other)
    decomposition.save(tmp_path / "half", dtype=torch.float16)
    assert Clustering.load(path, Decomposition.load(tmp_path / "half")).components == clustering.components
    with pytest.raises(ValueError, match="patterns are of another decomposition"):
        cluster(other, model, importance_patterns(decomposition, model, tokens))


def test_edges_of_components_are_sums(target, clustering: Clustering):
    model, decomposition, tokens = target
    graph = attribution_graph(decomposition, model, tokens[:1])
    table = component_edges(graph, clustering)
    names = {}
    for label in graph.labels:
        address, _, pos = label.rpartition("@")
        inside = [c.number for c in clustering if address in map(str, c.members)]
        names[label] = f"component:{inside[0]}@{pos}" if inside else label
    assert any(name.startswith("component") for name in names.values())
    expected: dict[tuple[str, str], float] = {}
    for edge in graph.to_pandas().itertuples():
        pair = names[edge.source], names[edge.target]
        if pair[0] != pair[1]:
            expected[pair] = expected.get(pair, 0.0) + edge.weight
    assert {(e.source, e.target): e.weight for e in table.itertuples()} == pytest.approx(expected, abs=1e-6)
    assert table.weight.abs().is_monotonic_decreasing


def test_edges_of_components_over_many_prompts_are_sums(target, clustering: Clustering):
    model, decomposition, tokens = target
    graph = dataset_graph(decomposition, model, tokens, config=DatasetGraphConfig(absolute=False))
    number = {str(member): component.address for component in clustering for member in component}
    expected: dict[tuple[str, str], float] = {}
    for edge in graph.to_pandas().itertuples():
        pair = number.get(edge.source, edge.source), number.get(edge.target, edge.target)
        if pair[0] != pair[1]:
            expected[pair] = expected.get(pair, 0.0) + edge.signed
    table = component_edges(graph, clustering)
    assert {(e.source, e.target): e.weight for e in table.itertuples()} == pytest.approx(expected, abs=1e-5)
    assert "embed" in set(table.source) and table.edges.sum() <= len(graph.to_pandas())


def test_an_ensemble_has_a_row_per_alpha(target):
    model, decomposition, tokens = target
    patterns = importance_patterns(decomposition, model, tokens)
    ensemble = cluster_ensemble(decomposition, model, patterns, alphas=(0.1, 5.0), seeds=(0, 1))
    table = ensemble.to_pandas().set_index("alpha")
    assert table.components[5.0] >= table.components[0.1]
    runs = [ensemble.clusterings[0.1, seed].partition for seed in (0, 1)]
    assert table.distance[0.1] == pytest.approx(variation_of_information(*runs))


def test_wrong_arguments_are_refused(target, clustering: Clustering):
    model, decomposition, tokens = target
    with pytest.raises(ValueError, match="lower the threshold"):
        importance_patterns(decomposition, model, tokens, threshold=1.0)
    patterns = importance_patterns(decomposition, model, tokens)
    with pytest.raises(ValueError, match=r"threshold \(0\.01"):
        cluster(decomposition, model, patterns, config=ClusterConfig(threshold=0.5))
    with pytest.raises(ValueError, match="greed"):
        ClusterConfig(greed=0.0)
    with pytest.raises(ValueError, match="alpha"):
        ClusterConfig(alpha=-1.0)
    with pytest.raises(ValueError, match="at least one"):
        cluster_ensemble(decomposition, model, patterns, alphas=[])
    with pytest.raises(IndexError, match="does not exist"):
        clustering[len(clustering)]
    with pytest.raises(KeyError, match="in no component"):
        clustering.of("blocks.7.mlp.W_in:0")
