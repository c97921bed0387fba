"""Circuits of edges: against edges patched by TransformerLens's hooks, linear models, and all corners of the adversary's cube."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.testing import assert_close

from tests.marks import needs_bridge
from tests.tiny import ARCHITECTURES, some_tokens, tiny_model
from tl_vpd import bundled
from tl_vpd.adapters import adapt
from tl_vpd.analysis.audit import AuditConfig, RepairConfig, audit_circuit, repair_circuit
from tl_vpd.analysis.audit.auditor import random_circuit
from tl_vpd.analysis.audit.edge_set import edge_set_of
from tl_vpd.analysis.edge_attribution import EdgeAttributionConfig, connected, edge_attribution
from tl_vpd.analysis.edges import Edge

CORRUPTED = AuditConfig(ablations=["corrupted"], controls=0)
FLAGS = ("use_split_qkv_input", "use_attn_result", "use_hook_mlp_in", "use_attn_in", "ungroup_grouped_query_attention")


def metric(logits):
    return (logits[:, -1, 3] - logits[:, -1, 5]).mean()


@pytest.fixture
def corrupted(tokens):
    return some_tokens(seed=1)


def edges_of(model):
    return edge_set_of(adapt(model)).edges


def audited(model, tokens, edges, corrupted, config=CORRUPTED, **options):
    return audit_circuit(None, model, tokens, edges, metric, config=config, reference_prompts=corrupted, **options)


def reader_hook(model, edge):
    """Where an edge's target reads, and its head (None: it is not a head)."""
    if edge.target == "logits":
        return f"blocks.{model.cfg.n_layers - 1}.hook_resid_post", None
    layer, _, head = edge.target[1:].partition(".h")
    return (f"blocks.{layer}.hook_{edge.reads}_input", int(head)) if head else (f"blocks.{layer}.hook_mlp_in", None)


def output_of(cache, source):
    if source == "input":
        return cache["blocks.0.hook_resid_pre"]
    layer, _, head = source[1:].partition(".h")
    return cache["result", int(layer)][:, :, int(head)] if head else cache["mlp_out", int(layer)]


def flags_on(model):
    model.set_use_split_qkv_input(True)
    model.set_use_attn_result(True)
    if model.cfg.n_key_value_heads is not None:
        model.set_ungroup_grouped_query_attention(True)
    if not model.cfg.attn_only:
        model.set_use_hook_mlp_in(True)
    return model


def patched(model, tokens, corrupted, edge):
    """The metric with one edge patched: the target reads what the source writes on the other prompts."""
    with torch.no_grad():
        clean, other = (output_of(model.run_with_cache(t)[1], edge.source) for t in (tokens, corrupted))
        name, head = reader_hook(model, edge)

        def patch(x, hook):
            x = x.clone()
            (x if head is None else x[:, :, head]).add_(other - clean)
            return x

        return float(metric(model.run_with_hooks(tokens, fwd_hooks=[(name, patch)])))


@pytest.mark.parametrize("name", ["rms, gated, grouped", "shortformer", "parallel"])
def test_one_edge_left_out_is_that_edge_patched_and_all_left_out_are_the_other_prompts(name, tokens, corrupted):
    model = tiny_model(**ARCHITECTURES[name])
    edges = edges_of(model)
    with torch.no_grad():
        whole, other = float(metric(model(tokens))), float(metric(model(corrupted)))
    result = audited(model, tokens, edges, corrupted)
    assert result.whole == pytest.approx(whole, abs=1e-12) and result.value("corrupted") == pytest.approx(
        whole, abs=1e-12
    )
    assert result.rows["nothing"][0] == pytest.approx(other, abs=1e-12)
    patcher = flags_on(tiny_model(**ARCHITECTURES[name]))
    for edge in edges[1 :: len(edges) // 3]:
        rest = [e for e in edges if e != edge]
        value = audited(model, tokens, rest, corrupted).value("corrupted")
        assert value == pytest.approx(patched(patcher, tokens, corrupted, edge), abs=1e-10)
    assert not any(getattr(model.cfg, flag) for flag in FLAGS)


def test_the_edges_of_a_model(model):
    labels = edge_set_of(adapt(model)).labels()
    assert len(labels) == 2 * 3 * 1 + 3 + 2 * 3 * 4 + 6 + 7
    assert labels[:3] == ["input->a0.h0<q>", "input->a0.h1<q>", "input->a0.h0<k>"] and labels[-1] == "m1->logits"
    assert "a0.h1->m0" in labels and "m0->a1.h0<v>" in labels and "m0->m0" not in labels and "a1.h0->m0" not in labels
    parallel = edge_set_of(adapt(tiny_model(parallel_attn_mlp=True))).labels()
    assert "a0.h1->m0" not in parallel and "a0.h1->m1" in parallel
    assert edge_set_of(adapt(model), ["*->logits", "input->m*"]).labels() == [
        "input->m0", "input->m1", *(f"{s}->logits" for s in ("input", "a0.h0", "a0.h1", "m0", "a1.h0", "a1.h1", "m1"))
    ]  # fmt: skip


def test_addresses_are_read_as_they_are_written():
    for text in ("input->m0", "a0.h11->a1.h3<q>", "m0->logits", "a0.h1->m3@5", "input->a0.h0@2"):
        assert str(Edge.parse(text)) == text
    assert Edge.parse("input->m0") == Edge("input", "m0") and Edge.parse(Edge("m0", "m1")) == Edge("m0", "m1")
    assert [e.reads for e in Edge("input", "a0.h0").alternatives()] == ["q", "k", "v"]
    for wrong in (
        "input->",
        "logits->m0",
        "m0->input",
        "m0->m1<q>",
        "a0->m1",
        "a0.h1->a1.h1<o>",
        "m0->m1@-1",
        "m²->m3",
    ):
        with pytest.raises(ValueError, match=r"\.$"):
            Edge.parse(wrong)
    for arguments in (
        ("logits", "m0"),
        ("m0", "input"),
        ("m0", "m1", "q"),
        ("m0", "a1.h0", "x"),
        ("m0", "m1", None, -1),
    ):
        with pytest.raises(ValueError, match=r"\.$"):
            Edge(*arguments)


def test_an_edge_at_a_position_is_the_targets_position(model, tokens, corrupted):
    rest = [e for e in edges_of(model) if str(e) != "input->m1"]
    at = [Edge("input", "m1", pos=pos) for pos in range(6)]  # all but the last
    value = audited(model, tokens, [*rest, *at], corrupted).value("corrupted")
    patcher = flags_on(tiny_model())
    with torch.no_grad():
        clean, other = (output_of(patcher.run_with_cache(t)[1], "input") for t in (tokens, corrupted))

        def patch(x, hook):
            return torch.cat([x[:, :-1], (x + other - clean)[:, -1:]], 1)

        expected = float(metric(patcher.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_mlp_in", patch)])))
    assert value == pytest.approx(expected, abs=1e-10)


def test_zero_and_mean_into_the_logits_by_hand():
    """Without norms the logits are a sum over the edges into them."""
    model, tokens = tiny_model(normalization_type=None, attn_only=True), some_tokens()
    config = AuditConfig(ablations=["zero", "mean"], among="*->logits", controls=0)
    result = audited(model, tokens, ["input->logits", "a1.h0->logits"], None, config)
    with torch.no_grad():
        _, cache = flags_on(tiny_model(normalization_type=None, attn_only=True)).run_with_cache(tokens)
        out = {s: output_of(cache, s) for s in ("input", "a0.h0", "a0.h1", "a1.h0", "a1.h1")}
        bias = sum(block.attn.b_O for block in model.blocks)
        for name, ablated in (("zero", torch.zeros_like), ("mean", lambda x: x.mean((0, 1)).expand_as(x))):
            stream = bias + sum(x if s in ("input", "a1.h0") else ablated(x) for s, x in out.items())
            assert result.value(name) == pytest.approx(float(metric(model.unembed(stream))), abs=1e-12)


def test_the_adversary_finds_the_worst_corner_where_the_metric_is_linear(tokens, corrupted):
    model = tiny_model(normalization_type=None, attn_only=True)
    config = AuditConfig(
        ablations=["corrupted", "stochastic", "adversarial"],
        reference="corrupted",
        budgets=(4,),
        controls=0,
        among="*->logits",
    )
    circuit = ["input->logits", "a0.h1->logits"]
    result = audited(model, tokens, circuit, corrupted, config)
    others = ["a0.h0->logits", "a1.h0->logits", "a1.h1->logits"]
    corners = [
        audited(
            model, tokens, [*circuit, *(e for e, on in zip(others, bits, strict=True) if on)], corrupted,
            AuditConfig(ablations=["corrupted"], controls=0, among="*->logits"),
        ).value("corrupted")
        for bits in product((False, True), repeat=3)
    ]  # fmt: skip
    assert result.value("corrupted") == pytest.approx(corners[0], abs=1e-9)
    assert result.value("adversarial") == pytest.approx(min(corners), abs=1e-6)
    assert min(corners) < result.value("stochastic") < max(corners)
    assert set(result.top(3)["node"]) >= {e for e, on in zip(others, bits_of(corners), strict=True) if on}


def bits_of(corners):
    return list(product((False, True), repeat=3))[corners.index(min(corners))]


def test_a_repair_adds_edges_until_the_adversary_no_longer_breaks_it(tokens, corrupted):
    model = tiny_model(attn_only=True, n_layers=1)
    with torch.no_grad():
        lower = bool(metric(model(tokens)) < metric(model(corrupted)))
    config = RepairConfig(
        target=0.9, steps=4, max_added=40, candidates=4, reference="corrupted", lower_is_better=lower, restarts=1
    )
    fixed = repair_circuit(None, model, tokens, ["input->logits"], metric, config=config, reference_prompts=corrupted)
    assert fixed.holds and len(fixed.nodes) == 1 + len(fixed.added) and fixed.added[0] in edges_of(model)
    again = AuditConfig(
        ablations=["adversarial"], reference="corrupted", budgets=(10,), controls=0, lower_is_better=lower
    )
    start = audited(model, tokens, ["input->logits"], corrupted, again).rows["recovered"][0]
    assert audited(model, tokens, fixed.nodes, corrupted, again).rows["recovered"][0] > max(0.5, start)


def test_controls_have_as_many_edges_of_each_kind(model):
    edge_set = edge_set_of(adapt(model))
    circuit = [Edge.parse(e) for e in ("input->m0", "a0.h0->a1.h1<q>", "a0.h1->a1.h1<q>", "m1->logits")]
    generator, drawn = torch.Generator().manual_seed(0), []
    for _ in range(10):
        chosen = random_circuit(edge_set, edge_set.contains(circuit, 7), generator)[0]
        drawn.append([edge_set.edges[i] for i in chosen.nonzero().flatten().tolist()])
        kinds = sorted((e.source[0], e.reads or e.target[0]) for e in drawn[-1])
        assert kinds == [("a", "q"), ("a", "q"), ("i", "m"), ("m", "l")]
    assert len({tuple(edges) for edges in drawn}) > 3


def test_eap_is_what_patching_an_edge_does_where_the_change_is_small(tokens):
    """Tokens whose embeddings differ by 1e-5: the first order is all there is."""
    model = tiny_model()
    with torch.no_grad():
        model.W_E[10] = model.W_E[int(tokens[0, 2])] + 1e-5 * torch.randn(8, generator=torch.Generator().manual_seed(3))
    tokens = tokens[:1]
    corrupted = tokens.clone()
    corrupted[0, 2] = 10
    scores = edge_attribution(model, tokens, metric, reference_prompts=corrupted)
    patcher = flags_on(tiny_model())
    patcher.load_state_dict(model.state_dict())
    with torch.no_grad():
        whole = float(metric(model(tokens)))
    patched_by = torch.tensor([patched(patcher, tokens, corrupted, e) - whole for e in scores.edges]).double()
    assert float(patched_by.abs().max()) > 1e-7
    assert_close(scores.scores.double(), patched_by, rtol=1e-3, atol=1e-9)
    assert scores.whole == pytest.approx(whole, abs=1e-12)
    assert scores.top(1)["edge"][0] == str(scores.edges[int(patched_by.abs().argmax())])


def test_eap_into_the_logits_by_hand(tokens, corrupted):
    """Without norms, an edge's score is its source's difference along the direction of the metric: no approximation."""
    model = tiny_model(normalization_type=None)
    scores = edge_attribution(model, tokens, metric, reference_prompts=corrupted)
    direction = model.W_U[:, 3] - model.W_U[:, 5]
    patcher = flags_on(tiny_model(normalization_type=None))
    with torch.no_grad():
        caches = [patcher.run_with_cache(t)[1] for t in (tokens, corrupted)]
        for edge, score in zip(scores.edges, scores.scores.tolist(), strict=True):
            if edge.target == "logits":
                clean, other = (output_of(cache, edge.source)[:, -1] for cache in caches)
                assert score == pytest.approx(float(((other - clean) @ direction).mean()), abs=1e-6)


@pytest.mark.parametrize("reference", ["corrupted", "zero"])
def test_eap_ig_is_the_mean_gradient_along_the_embeddings(tokens, corrupted, reference):
    model, steps = tiny_model(), 3
    config = EdgeAttributionConfig(ig_steps=steps, reference=reference)
    scores = edge_attribution(model, tokens, metric, reference_prompts=corrupted, config=config)
    patcher = flags_on(tiny_model())
    with torch.no_grad():
        clean, other = (patcher.run_with_cache(t)[1] for t in (tokens, corrupted))
    difference = {
        s: (output_of(other, s) if reference == "corrupted" else 0) - output_of(clean, s)
        for s in {e.source for e in scores.edges}
    }
    gradients = {}
    for k in range(1, steps + 1):
        inputs = {}

        def start(x, hook, k=k):
            return (x + (1 - k / steps) * difference["input"]).detach().requires_grad_()

        def note(x, hook, inputs=inputs):
            inputs[hook.name] = x
            x.retain_grad()

        names = {reader_hook(patcher, e)[0] for e in scores.edges}
        with patcher.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", start), *((name, note) for name in names)]):
            metric(patcher(tokens)).backward()
        for name, x in inputs.items():
            gradients[name] = gradients.get(name, 0) + x.grad / steps
    for edge, score in zip(scores.edges, scores.scores.tolist(), strict=True):
        name, head = reader_hook(patcher, edge)
        gradient = gradients[name] if head is None else gradients[name][:, :, head]
        assert score == pytest.approx(float((difference[edge.source] * gradient).sum()), abs=1e-5)


def test_a_circuit_of_the_largest_scores_has_no_dead_ends(model, tokens, corrupted):
    scores = edge_attribution(model, tokens, metric, reference_prompts=corrupted)
    circuit = scores.circuit(12)
    assert set(map(str, circuit)) <= set(scores.top(12)["edge"]) and connected(circuit) == circuit
    assert scores.circuit(len(scores.edges)) == scores.edges
    parse = [Edge.parse(e) for e in ("input->m0", "m0->m1", "input->a1.h0<q>", "a0.h0->logits", "m1->logits")]
    assert [str(e) for e in connected(parse)] == ["input->m0", "m0->m1", "m1->logits"]
    with pytest.raises(ValueError, match="no path from the input to the logits"):
        edge_attribution(
            tiny_model(), tokens, lambda logits: logits[:, 0, 0].sum(), reference_prompts=corrupted
        ).circuit(1)


@needs_bridge
def test_a_bridge_gives_the_hooked_transformers_edges():
    tokens = bundled.tokens("validation")[:4, :10]
    clean, corrupted, rows = tokens[:2], tokens[2:], {}

    def logit(logits):
        return logits[:, -1].log_softmax(-1)[:, 20].mean()

    for kind in ("hooked_transformer", "bridge"):
        model = bundled.model(kind=kind)
        scores = edge_attribution(model, clean, logit, reference_prompts=corrupted)
        circuit = ["input->m0", "m0->m1", "a0.h1->a1.h2<q>", "m1->logits", "input->logits"]
        config = AuditConfig(ablations=["corrupted", "mean"], controls=0)
        audit = audit_circuit(None, model, clean, circuit, logit, config=config, reference_prompts=corrupted)
        rows[kind] = torch.tensor([audit.whole, *audit.rows["circuit"], *audit.rows["nothing"]]), scores.scores
        assert not any(getattr(model.cfg, flag, False) for flag in FLAGS)
    for a, b in zip(*rows.values(), strict=True):
        assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_the_model_is_left_as_it_was(model, vpd, tokens, corrupted):
    circuit = ["input->logits", "m0->logits"]
    alone = audited(model, tokens, circuit, corrupted)
    model.set_use_attn_in(True)
    assert audited(model, tokens, circuit, corrupted).value("corrupted") == pytest.approx(
        alone.value("corrupted"), abs=1e-12
    )
    assert [getattr(model.cfg, flag) for flag in FLAGS] == [False, False, False, True, False]
    model.set_use_attn_in(False)
    with vpd.attach(model):
        assert audited(model, tokens, circuit, corrupted).rows.equals(alone.rows)
    with pytest.raises(ZeroDivisionError):
        audit_circuit(
            None, model, tokens, circuit, lambda logits: 1 // 0, config=CORRUPTED, reference_prompts=corrupted
        )
    assert not any(getattr(model.cfg, flag) for flag in FLAGS) and not any(
        p._forward_hooks for p in model.hook_dict.values()
    )
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("edges", "error", "says"),
    [
        (["input->m9"], KeyError, "did you mean"),
        (["m1->a0.h0<q>"], KeyError, "to a later one"),
        (["input->a0.h7"], KeyError, "not among the 46 edges"),
        (["input->m0", "blocks.0.hook_mlp_out"], ValueError, "mixes edges"),
        (["input->m0@7"], IndexError, "7 positions"),
        (["input->m0->m1"], ValueError, "is not an edge"),
    ],
)
def test_edges_that_cannot_be_are_refused(model, tokens, corrupted, edges, error, says):
    with pytest.raises(error, match=says):
        audited(model, tokens, edges, corrupted)


def test_models_and_prompts_that_do_not_fit_are_refused(model, tokens, corrupted):
    for reference, says in [
        (None, "no reference_prompts"),
        (corrupted[:1], r"shape \(1, 7\)"),
        (corrupted[:, :5], "same length"),
    ]:
        with pytest.raises(ValueError, match=says):
            audited(model, tokens, ["input->logits"], reference)
        with pytest.raises(ValueError, match=says):
            edge_attribution(model, tokens, metric, reference_prompts=reference)
    normed = tiny_model(normalization_type="RMS", use_normalization_before_and_after=True)
    with pytest.raises(ValueError, match="not the sum of its heads and MLPs"):
        edge_attribution(normed, tokens, metric, reference_prompts=corrupted)
    assert not any(getattr(normed.cfg, flag) for flag in FLAGS)
    with pytest.raises(ValueError, match="cannot be differentiated"):
        edge_attribution(model, tokens, lambda logits: 1.0, reference_prompts=corrupted)
    with pytest.raises(ValueError, match="ig_steps=0"):
        EdgeAttributionConfig(ig_steps=0)
