"""Attributions over a data set, against the sums of single prompts' edges."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.tiny import decomposition_of, some_tokens, tiny_model
from tl_vpd.analysis.graph import DatasetGraphConfig, GraphConfig, attribution_graph, dataset_graph


def expected(vpd, model, prompts, absolute):
    """The definition, from graphs without importances of each prompt."""
    n = vpd.site_axis.total
    total, g_sum, squares, count = torch.zeros(n, n + 1, dtype=torch.float64), torch.zeros(n + 1), torch.zeros(n), 0
    starts = torch.tensor([0, *[rows.start for rows in vpd.site_axis.slices.values()], 0])
    for prompt in prompts:
        prompt = prompt[None]
        graph = attribution_graph(vpd, model, prompt, 3, config=GraphConfig(importances=False))
        g = vpd.causal_importances(model, prompt).concatenated[0]
        acts = torch.cat([vpd.component_acts(model, prompt)[s][0] for s in vpd.sites], -1)
        inner, concatenated = graph.target < len(graph) - 1, starts[graph.kind] + graph.index
        source, target, weight = graph.source[inner].long(), graph.target[inner].long(), graph.weight[inner]
        embedded = graph.kind[source] == 0
        weight = weight * torch.where(embedded, 1.0, g[graph.pos[source], concatenated[source].clamp(max=n - 1)])
        if absolute:
            weight = weight * acts[graph.pos[target], concatenated[target]].sign()
        columns = torch.where(embedded, 0, concatenated[source] + 1)
        total.index_put_((concatenated[target], columns), weight, accumulate=True)
        g_sum, squares, count = (
            g_sum + torch.cat([g.new_tensor([len(g)]), g.sum(0)]),
            squares + acts.square().sum(0),
            count + len(g),
        )
    rms = (squares / count).sqrt()
    return total / (g_sum[None] * rms[:, None]), g_sum[1:] / count, rms


@pytest.mark.parametrize("C", [4, 10])
def test_it_is_the_sum_of_prompts_normalised(C):
    model = tiny_model()
    vpd = decomposition_of(model, C=C).to(torch.float64)
    prompts = some_tokens(shape=(3, 4))
    result = dataset_graph(vpd, model, prompts, config=DatasetGraphConfig(batch_size=2))
    columns = [i for i, c in enumerate(vpd.site_axis.subcomponents()) if c in result.nodes]
    for kind in ("signed", "absolute"):
        weights, importance, rms = expected(vpd, model, prompts, kind == "absolute")
        assert_close(getattr(result, kind), weights[columns][:, [0, *[i + 1 for i in columns]]], rtol=1e-8, atol=1e-11)
    assert_close(result.mean_importance, importance[columns])
    assert_close(result.rms, rms[columns])
    assert result.tokens == 12 and (importance[[i for i in range(len(importance)) if i not in columns]] <= 1e-6).all()


def test_padding_counts_for_nothing(model, vpd):
    short, long = some_tokens(shape=(1, 4)), some_tokens(seed=1, shape=(1, 6))
    padded = torch.cat([torch.cat([short, short[:, :2]], 1), long])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    together = dataset_graph(vpd, model, padded, config=DatasetGraphConfig(absolute=False), attention_mask=mask)
    a, b = (
        dataset_graph(vpd, model, columns, together.nodes, config=DatasetGraphConfig(absolute=False))
        for columns in (short, long)
    )
    scale = lambda d: d.mean_importance * d.tokens  # noqa: E731
    sums = sum(d.signed[:, 1:] * scale(d) * d.rms[:, None] for d in (a, b))
    assert_close(together.signed[:, 1:] * scale(together) * together.rms[:, None], sums, rtol=1e-6, atol=1e-9)


def test_chosen_nodes_and_tables(model, vpd, tokens):
    whole = dataset_graph(vpd, model, tokens)
    some = [
        str(next(c for c in whole.nodes if c.site == s))
        for s in ("blocks.0.attn.W_V", "blocks.1.attn.W_O", "blocks.1.mlp.W_in")
    ]
    result = dataset_graph(vpd, model, tokens, some, config=DatasetGraphConfig(batch_size=1))
    assert result.labels == ("embed", *some)
    at = [0, *[whole.labels.index(label) for label in some]]
    assert_close(result.signed, whole.signed[[i - 1 for i in at[1:]]][:, at], rtol=1e-6, atol=1e-9)
    table = result.top_edges(2, target=some[2])
    assert set(table.target) == {some[2]} and table.signed.abs().is_monotonic_decreasing
    assert set(result.top_edges(9, source="embed", absolute=True).source) == {"embed"}
    assert len(result.to_pandas()) == int((result.signed != 0).sum())
    with pytest.raises(KeyError, match="is not a node of this graph"):
        result.top_edges(target="embed")
    with pytest.raises(IndexError, match="has 6 subcomponents"):
        dataset_graph(vpd, model, tokens, ["blocks.0.attn.W_V:9"])
    with pytest.raises(ValueError, match="no absolute version"):
        dataset_graph(vpd, model, tokens, some, config=DatasetGraphConfig(absolute=False)).top_edges(absolute=True)
