"""Edges of attribution graphs against finite differences, with every other subcomponent fixed at its value by public hooks."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.adapters.custom_models import TRANSFORMER, TwoLayers
from tests.hooks.test_clean import assert_same, snapshot
from tests.marks import needs_bridge
from tests.matrix.models import build
from tests.tiny import ARCHITECTURES, decomposition_of, some_tokens, tiny_model
from tl_vpd import VPDConfig
from tl_vpd.adapters import Unsupported
from tl_vpd.adapters.versions import transformer_lens_version
from tl_vpd.analysis.graph import GraphConfig, attribution_graph
from tl_vpd.analysis.graph.rows import Block, groups
from tl_vpd.analysis.nodes import Node
from tl_vpd.analysis.pruning import prune
from tl_vpd.training import new_decomposition

EPS = 1e-5
CHOSEN = ["rms, gated, grouped", "layernorm", "parallel", "shortformer", "bidirectional", "sliding window"]
BRIDGES = [pytest.param(name, marks=needs_bridge) for name in ("bridge GPT-2", "native Llama", "bridge Llama")]


def case(name):
    """A model, a decomposition and one prompt of five tokens, in float64."""
    if name in ARCHITECTURES:
        model = tiny_model(**ARCHITECTURES[name])
    else:
        kind, _, family = name.partition(" ")
        model = build(family, kind)
    return model, decomposition_of(model, C=5).to(torch.float64), some_tokens(shape=(1, 5))


NAMES = [*CHOSEN, *BRIDGES]


def close(name):
    """The step of differences and how near they come: bridges' Llamas compute some of it in float32."""
    return (1e-3, dict(rtol=2e-2, atol=2e-3)) if "Llama" in name else (EPS, dict(rtol=1e-5, atol=1e-8))


def with_acts(model, vpd, tokens, acts, change=None):
    """Activations (before they are put back) and logits where every subcomponent has the value given; Δ's path is free."""
    seen = {}

    def hook(site):
        def put(own, hook):
            seen[site] = own.detach().clone()
            return acts[site]

        return (vpd.sites[site].hook_name("component_acts"), put)

    hooks = [hook(site) for site in vpd.sites] + ([] if change is None else [change])
    tokens = tokens.expand(max(len(own) for own in acts.values()), -1)
    with torch.no_grad(), vpd.attach(model):
        logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
    return seen, logits


def values(graph, seen, logits):
    """Every node's value, read off a pass."""
    found = []
    for label in graph.labels[len(graph.words) :]:
        if label.startswith("logits"):
            continue
        node = Node.parse(label)
        found.append(seen[node.name][:, node.pos, node.index])
    found += [logits[:, t.pos] @ t.direction(logits) for t in graph.logits]
    return torch.stack(found)


def slopes(graph, model, vpd, tokens, acts, nodes, eps=EPS):
    """Central differences of every node's value in the activations of some, one column a node."""
    moved = {site: own.repeat(2 * len(nodes), 1, 1) for site, own in acts.items()}
    for i, node in enumerate(nodes):
        moved[node.name][2 * i, node.pos, node.index] += eps
        moved[node.name][2 * i + 1, node.pos, node.index] -= eps
    found = values(graph, *with_acts(model, vpd, tokens, moved))
    return (found[:, ::2] - found[:, 1::2]) / (2 * eps)


def dense(graph):
    found = torch.zeros(len(graph), len(graph), dtype=graph.weight.dtype)
    found[graph.target.long(), graph.source.long()] = graph.weight
    return found


@pytest.mark.parametrize("name", NAMES)
def test_edges_are_finite_differences_with_the_other_subcomponents_fixed(name):
    model, vpd, tokens = case(name)
    graph = attribution_graph(vpd, model, tokens, [3, (4, 2)], config=GraphConfig(tokens_at_once=40), pos=3)
    assert len(graph) > 60
    W, acts = dense(graph), dict(vpd.component_acts(model, tokens))
    n = len(graph.words)
    g = vpd.causal_importances(model, tokens)
    expected_nodes = sum(int((g[site] > 0).sum()) for site in vpd.sites)
    assert len(graph) == expected_nodes + n + 2
    numbers = (torch.randperm(len(graph) - n - 2, generator=torch.Generator().manual_seed(0))[:40] + n).tolist()
    nodes = [Node.parse(graph.labels[number]) for number in numbers]
    eps, tolerance = close(name)
    strength = torch.stack([(acts[o.name] * g[o.name])[0, o.pos, o.index] for o in nodes])
    assert_close(W[n:, numbers], slopes(graph, model, vpd, tokens, acts, nodes, eps) * strength, **tolerance)


@pytest.mark.parametrize("name", ["layernorm", "bridge GPT-2"])
def test_an_embeddings_edge_is_gradient_times_embedding(name):
    model, vpd, tokens = case(name)
    graph = attribution_graph(vpd, model, tokens, 3)
    W, acts, n = dense(graph), dict(vpd.component_acts(model, tokens)), len(graph.words)
    for pos in (0, 4):
        found = []
        for sign in (1, -1):

            def scale(resid, hook, factor=1 + sign * EPS, pos=pos):
                resid[:, pos] *= factor
                return resid

            found.append(values(graph, *with_acts(model, vpd, tokens, acts, ("blocks.0.hook_resid_pre", scale))))
        assert_close(W[n:, pos], ((found[0] - found[1]) / (2 * EPS))[:, 0], rtol=1e-5, atol=1e-8)
    assert not W[:n].any()


@pytest.mark.parametrize("name", [*CHOSEN[:3], "folded norm", "no norm", *BRIDGES[:2]])
def test_with_norms_and_deltas_fixed_terms_add_up_to_the_value(name):
    model, vpd, tokens = case(name)
    graph = attribution_graph(
        vpd, model, tokens, [3, (4, 2)], config=GraphConfig(fixed=("norms", "deltas"), importances=False)
    )
    assert len(graph) == vpd.site_axis.total * 5 + 5 + 2
    sums, near = graph.sums().set_index("node"), 1e-5 if "Llama" in name else 1e-10
    nonlinear = sums.index.str.contains("W_O|W_out")
    assert sums[~nonlinear].rest.abs().max() < near and sums.rest.abs().max() > 1e-3
    logits = model(tokens)[0, -1].detach()
    assert sums.value["logits:3@4"] == pytest.approx(float(logits[3]), abs=near)
    assert sums.value["logits:4-2@4"] == pytest.approx(float(logits[4] - logits[2]), abs=near)
    fixed = ("norms", "deltas", "patterns")
    if name == "native Llama" and transformer_lens_version() < (4,):  # later ones hook their patterns
        with pytest.raises(RuntimeError, match="computes attention past its hook_pattern"):
            attribution_graph(vpd, model, tokens, 3, config=GraphConfig(fixed=fixed, importances=False))
        return
    patterns = attribution_graph(vpd, model, tokens, 3, config=GraphConfig(fixed=fixed, importances=False))
    sums = patterns.sums().set_index("node")
    assert sums[~sums.index.str.contains("W_out")].rest.abs().max() < near
    assert not any("W_Q" in own or "W_K" in own for own in patterns.to_pandas().source)


def test_the_terms_of_a_logit_by_hand(model, vpd, tokens):
    """Of a logit at fixed norms: what O and out write at this position, read through the final norm's scale."""
    prompt = tokens[:1, :5]
    graph = attribution_graph(vpd, model, prompt, 3, config=GraphConfig(fixed=("norms", "deltas"), importances=False))
    with torch.no_grad():
        _, cache = model.run_with_cache(prompt)
        read = (model.W_U[:, 3] * model.ln_final.w - (model.W_U[:, 3] * model.ln_final.w).mean()) / cache[
            "ln_final.hook_scale"
        ][0, -1]
        resid = cache["blocks.0.hook_resid_pre"][0, -1]
        acts = vpd.component_acts(model, prompt)
        expected = {
            f"{s}:{c}@4": acts[s][0, 4, c] * (vpd.U[s][c] @ read)
            for s in vpd.sites
            if s[-2:] in ("_O", "ut")
            for c in range(6)
        }
        bias = model.ln_final.b @ model.W_U[:, 3] + model.b_U[3]
        bias += sum(b @ read for block in model.blocks for b in (block.attn.b_O, block.mlp.b_out))
    found = {row.source: row.weight for row in graph.top_edges(10_000, target="logits:3@4").itertuples()}
    assert found.keys() == {*expected, "embed@4"}
    assert found["embed@4"] == pytest.approx(float(resid @ read), abs=1e-10)
    for label, value in expected.items():
        assert found[label] == pytest.approx(float(value), abs=1e-10)
    assert float(graph.biases[-1]) == pytest.approx(float(bias), abs=1e-10)


@pytest.mark.parametrize("flags", [{}, {"attention_dir": "bidirectional"}])
def test_batches_and_combinations_change_nothing(flags):
    model = tiny_model(**flags)
    vpd = decomposition_of(model, C=14).to(torch.float64)  # more targets than d_model = 8: rows are combined
    prompt = some_tokens(shape=(1, 6))
    whole = attribution_graph(vpd, model, prompt, [1, 2, 3], config=GraphConfig(tokens_at_once=100_000))
    for budget in (1, 7, 50, 300):
        other = attribution_graph(vpd, model, prompt, [1, 2, 3], config=GraphConfig(tokens_at_once=budget))
        assert other.labels == whole.labels
        assert_close(dense(other), dense(whole), rtol=1e-9, atol=1e-12)


def test_a_later_token_changes_no_earlier_edge_of_a_causal_model(model, vpd, tokens):
    a = attribution_graph(vpd, model, tokens[:1], 3, config=GraphConfig(importances=False), pos=2)
    b = attribution_graph(vpd, model, tokens[:1, :3], 3, config=GraphConfig(importances=False), pos=2)
    ours = {(r.source, r.target): r.weight for r in a.to_pandas().itertuples()}
    for row in b.to_pandas().itertuples():
        assert ours[row.source, row.target] == pytest.approx(row.weight, rel=1e-8, abs=1e-12)


def test_weights_that_are_no_sites_are_part_of_the_model(model, tokens):
    vpd = decomposition_of(model, sites=["blocks.*.attn.W_O", "blocks.1.mlp.W_in"]).to(torch.float64)
    prompt = tokens[:1, :5]
    graph = attribution_graph(vpd, model, prompt, 3, config=GraphConfig(importances=False))
    acts, node = dict(vpd.component_acts(model, prompt)), Node("blocks.0.attn.W_O", 2, 1)
    expected = slopes(graph, model, vpd, prompt, acts, [node])[:, 0] * acts[node.name][0, 1, 2]
    assert_close(dense(graph)[5:, graph.number(node)], expected, rtol=1e-5, atol=1e-8)


def test_the_model_is_left_as_it_was(model, vpd, tokens):
    model.add_hook("hook_embed", lambda x, hook: x * 2)
    before = snapshot(model)
    attribution_graph(vpd, model, tokens[:1], 3, config=GraphConfig(fixed=("norms", "patterns")))
    assert_same(before, snapshot(model))
    with torch.inference_mode():
        attribution_graph(vpd, model, tokens[:1], 3)
    with vpd.attach(model) as attached, attached.masked("zero"):
        inside = attribution_graph(vpd, model, tokens[:1], 3)
    assert_close(dense(inside), dense(attribution_graph(vpd, model, tokens[:1], 3)))
    assert_same(before, snapshot(model))


def test_rows_never_exceed_the_width_and_batches_hold_them_all():
    reads = torch.randn(9, 4)
    wide, narrow = Block.of("a", 0, torch.arange(9), reads), Block.of("b", 3, torch.arange(3), reads[:3])
    assert len(wide.seeds) == 4 and torch.equal(wide.combine, reads) and narrow.combine is None
    for budget in (1, 5, 8, 100):
        rows = []
        for group in groups([wide, narrow], ["a", "b"], 4, budget, causal=True):
            assert group.copies * group.length <= max(budget, group.length)
            for batch in group.batches():
                assert sum(own.stop - own.start for _, own, _ in batch) <= group.copies
                assert all(own.stop - own.start == where.stop - where.start for _, own, where in batch)
                rows += [(block.site, i) for block, own, _ in batch for i in range(own.start, own.stop)]
        assert sorted(rows) == [("a", i) for i in range(4)] + [("b", i) for i in range(3)]


def test_mistakes_are_said(model, vpd, tokens):
    with pytest.raises(ValueError, match="2: use dataset_graph"):
        attribution_graph(vpd, model, tokens, 3)
    with pytest.raises(ValueError, match=r"fixed\[0\]='norm' \(did you mean 'norms'\?\)"):
        attribution_graph(vpd, model, tokens[:1], 3, config=GraphConfig(fixed=("norm",)))
    with pytest.raises(IndexError, match="pos=9: the prompt has positions -7 to 6"):
        attribution_graph(vpd, model, tokens[:1], 3, pos=9)
    with pytest.raises(ValueError, match="a pair of tokens, each a text or a number"):
        attribution_graph(vpd, model, tokens[:1], (3, 0.5))
    with pytest.raises(ValueError, match=r"threshold=0\.1 does nothing with importances=False"):
        GraphConfig(threshold=0.1, importances=False)
    with pytest.raises(IndexError, match="Token 11 is outside"):
        attribution_graph(vpd, model, tokens[:1], 11)
    with pytest.raises(ValueError, match="no tokenizer"):
        attribution_graph(vpd, model, tokens[:1], ")")
    with pytest.raises(ValueError, match=r"leaves nothing to explain: the likeliest"):
        attribution_graph(vpd, model, tokens[:1], 1.0)
    with pytest.raises(TypeError, match="is not a target"):
        attribution_graph(vpd, model, tokens[:1], [None])
    with pytest.raises(ValueError, match=r"\(3, 3\) is one token twice"):
        attribution_graph(vpd, model, tokens[:1], (3, 3))
    model.set_use_split_qkv_input(True)
    with pytest.raises(ValueError, match="switch use_split_qkv_input"):
        attribution_graph(vpd, model, tokens[:1], 3)


def test_models_without_tokens_are_refused():
    model = TwoLayers()
    vpd = new_decomposition(model, VPDConfig(C=3, gamma=TRANSFORMER))
    with pytest.raises(Unsupported, match="A TwoLayers has no known embeddings"):
        attribution_graph(vpd, model, torch.zeros(1, 4))
    with pytest.raises(ValueError, match="A TwoLayers returns no logits of tokens"):
        prune(vpd, model, torch.zeros(1, 4), 1)
