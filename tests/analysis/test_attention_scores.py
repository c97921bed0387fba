"""Scores as sums over pairs: against the models' scores, rotations and formulas written out, and masks in the way."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from tests.marks import needs_bridge
from tests.matrix.models import build
from tests.tiny import decomposition_of, draw, some_tokens, tiny_model
from tl_vpd import bundled
from tl_vpd.adapters import Unsupported, adapt
from tl_vpd.analysis.attention import attention_by_offset, pair_ablation_hooks, pattern_of, score_terms
from tl_vpd.analysis.attention.kernel import measured_kernel, toeplitz
from tl_vpd.analysis.attention.layer_scores import unmasked
from tl_vpd.masking import Masks, SiteMask

Q, K = "blocks.1.attn.W_Q", "blocks.1.attn.W_K"
MODELS = {
    "learned": dict(positional_embedding_type="standard"),
    "rotary": {},
    "rotary, adjacent pairs": dict(rotary_adjacent_pairs=True),
    "rotary, partial": dict(rotary_dim=2),
    "grouped": dict(n_heads=4, n_key_value_heads=2, normalization_type="RMS", gated_mlp=True, act_fn="silu"),
    "ungrouped": dict(n_heads=4, n_key_value_heads=2, ungroup_grouped_query_attention=True),
    "own scale": dict(attn_scale=7.0),
    "no scale": dict(use_attn_scale=False),
    "scaled by layer": dict(scale_attn_by_inverse_layer_idx=True),
    "alibi": dict(positional_embedding_type="alibi"),
    "shortformer": dict(positional_embedding_type="shortformer"),
    "parallel": dict(parallel_attn_mlp=True),
    "bidirectional": dict(attention_dir="bidirectional"),
    "sliding window": dict(use_local_attn=True, window_size=3, attn_types=["global", "local"]),
}


def rotation(position: int, *, rotary_dim: int = 4, d_head: int = 4, adjacent: bool = False, base: float = 10_000.0):
    """R(t) written out: a plane for every frequency."""
    R = torch.eye(d_head, dtype=torch.float64)
    half = rotary_dim // 2
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if adjacent else (i, i + half)
        angle = torch.tensor(position * base ** (-2 * i / rotary_dim), dtype=torch.float64)
        R[a, a] = R[b, b] = angle.cos()
        R[a, b], R[b, a] = -angle.sin(), angle.sin()
    return R


def own_scores(model, tokens, layer=1):
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    return cache[f"blocks.{layer}.attn.hook_attn_scores"]


def total(terms):
    return terms.subcomponents + terms.delta + terms.bias + terms.position


@pytest.mark.parametrize(
    "flags", [{}, dict(rotary_adjacent_pairs=True), dict(rotary_dim=2), dict(rotary_base=100)], ids=str
)
def test_the_kernel_is_the_rotation_over_the_scale(flags):
    kernel = measured_kernel(adapt(tiny_model(**flags)), 1, 10)
    written = dict(rotary_dim=flags.get("rotary_dim", 4), adjacent=flags.get("rotary_adjacent_pairs", False))
    written["base"] = flags.get("rotary_base", 10_000)
    assert kernel.offsets.tolist() == list(range(10))
    for offset in range(10):
        expected = rotation(9, **written).T @ rotation(9 - offset, **written) / 4**0.5
        assert_close(kernel.values[offset], expected, rtol=0, atol=1e-6)  # TransformerLens rounds its angles
    assert kernel.scale == pytest.approx(2.0, abs=1e-9)
    with pytest.raises(ValueError, match="length=11: give an integer from 1 to 10"):
        measured_kernel(adapt(tiny_model(**flags)), 1, 11)


@pytest.mark.parametrize("name", MODELS)
def test_all_pairs_delta_bias_and_position_sum_to_the_models_scores(name):
    model, tokens = tiny_model(**MODELS[name]), some_tokens()
    vpd = decomposition_of(model, C=5).double()
    pairs = [(f"{Q}:{i}", f"{K}:{j}") for i in range(5) for j in range(5)]
    terms = score_terms(vpd, model, tokens, 1, pairs)
    scores = own_scores(model, tokens)
    recorded = unmasked(scores)
    assert torch.equal(recorded, terms.visible) and bool(recorded.any())
    assert_close(terms.scores, scores, rtol=0, atol=0)
    assert_close(total(terms)[recorded], scores[recorded], rtol=0, atol=1e-5)
    assert_close(terms.strengths.sum(0), terms.subcomponents, rtol=0, atol=1e-10)
    assert bool((terms.delta.abs().amax((0, 2, 3)) > 1e-3).all()) and bool((terms.bias.abs() > 1e-3).any())
    assert bool((terms.position[recorded] != 0).any()) == (name == "alibi")
    shares = terms.to_pandas().set_index("term")["fraction"]
    assert shares[["subcomponents", "delta", "bias", "position"]].sum() == pytest.approx(1.0, abs=1e-5)
    assert shares.iloc[4:].sum() == pytest.approx(shares["subcomponents"], abs=1e-9)


def test_a_pair_is_the_formula_written_out():
    model, tokens = tiny_model(n_heads=4, n_key_value_heads=2), some_tokens()
    vpd = decomposition_of(model).double()
    terms = score_terms(
        vpd, model, tokens, 1, [(f"{Q}:2", f"{K}:4"), ("bias", f"{K}:4"), (f"{Q}:2", "bias"), ("bias", "bias")]
    )
    acts = vpd.component_acts(model, tokens)
    U_Q, U_K = vpd.U[Q][2].view(4, 4), vpd.U[K][4].view(2, 4)
    attn = model.blocks[1].attn
    for head, t, s in [(0, 5, 2), (1, 6, 6), (2, 3, 0), (3, 6, 1)]:
        R = rotation(t).T @ rotation(s)
        a_q, a_k = acts[Q][1, t, 2], acts[K][1, s, 4]
        u_q, u_k = U_Q[head], U_K[head // 2]
        b_q, b_k = attn.b_Q[head], attn._b_K[head // 2]
        expected = [a_q * (u_q @ R @ u_k) * a_k, (b_q @ R @ u_k) * a_k, a_q * (u_q @ R @ b_k), b_q @ R @ b_k]
        assert_close(terms.strengths[:, 1, head, t, s], torch.stack(expected).detach() / 2, rtol=0, atol=1e-6)
    strongest = terms.top(1).iloc[0]
    where = (strongest["batch"], strongest["head"], strongest["query"], strongest["key"])
    assert abs(strongest["strength"]) == pytest.approx(float(terms.strengths.abs().max()))
    assert strongest["score"] == float(terms.scores[where])


@pytest.mark.parametrize(
    ("flags", "named"), [(dict(use_qk_norm=True), "qk-norm"), (dict(attn_scores_soft_cap=5.0), "softcap")]
)
def test_scores_that_are_no_sum_are_refused_by_name(flags, named):
    model = tiny_model(**flags)
    with pytest.raises(Unsupported, match=named):
        score_terms(decomposition_of(model).double(), model, some_tokens(), 1)


def test_scores_changed_past_the_flags_are_refused_by_the_check(model, monkeypatch):
    attn = model.blocks[1].attn
    plain = type(attn).calculate_attention_scores
    monkeypatch.setattr(
        type(attn), "calculate_attention_scores", lambda self, q, k: 3 * torch.tanh(plain(self, q, k) / 3)
    )
    with pytest.raises(Unsupported, match=r"block 1 differ by .* of the largest"):
        measured_kernel(adapt(model), 1, 7)


def test_padding_is_left_as_the_model_masks_it(model, vpd):
    tokens = some_tokens()
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    terms = score_terms(vpd, model, tokens, 1, attention_mask=mask)
    assert not bool(terms.visible[0, :, 3:, :3].any())
    assert_close(total(terms)[terms.visible], terms.scores[terms.visible], rtol=0, atol=1e-6)


@needs_bridge
@pytest.mark.parametrize("name", ["GPT-2", "GPT-NeoX", "GPT-J", "Llama", "Mistral", "Phi-3", "OPT", "Bloom"])
def test_bridges_scores_are_summed_or_refused(name):
    model = build(name, "bridge", torch.float64)
    vpd = decomposition_of(model).double()
    tokens = some_tokens(d_vocab=20)
    if name in (
        "GPT-J",
        "OPT",
    ):  # their attention runs inside transformers; the bridge shows the pattern in place of scores
        with pytest.raises(Unsupported, match="not scores before the softmax"):
            score_terms(vpd, model, tokens, 1)
        return
    terms = score_terms(vpd, model, tokens, 1, [(f"{Q}:0", f"{K}:1")])
    assert_close(total(terms)[terms.visible], terms.scores[terms.visible], rtol=0, atol=1e-5)
    with vpd.attach(model) as attached:
        hooks = pair_ablation_hooks(vpd, model, [(f"{Q}:0", f"{K}:1")], length=7)
        shown = {}
        hooks = [*hooks, ("blocks.1.attn.hook_pattern", lambda pattern, hook: shown.update(pattern=pattern.detach()))]
        with torch.no_grad():
            model.run_with_hooks(tokens, fwd_hooks=hooks)
        assert attached is not None
    assert_close(shown["pattern"], pattern_of(terms.without()), rtol=0, atol=1e-6)


@needs_bridge
def test_qk_norm_is_refused_on_a_bridge():
    model = build("Qwen3", "bridge", torch.float64)
    with pytest.raises(Unsupported, match="qk-norm"):
        score_terms(decomposition_of(model).double(), model, some_tokens(d_vocab=20), 1)


@needs_bridge
def test_the_bundled_model_on_both_classes():
    vpd, tokens = bundled.decomposition(), bundled.tokens("validation")[:2, :40]
    results = [
        score_terms(vpd, bundled.model(kind=kind), tokens, 1, [(f"{Q}:36", f"{K}:29")])
        for kind in ("hooked_transformer", "bridge")
    ]
    for terms in results:
        assert_close(total(terms)[terms.visible], terms.scores[terms.visible], rtol=0, atol=1e-5)
    assert_close(results[0].strengths, results[1].strengths, rtol=1e-4, atol=1e-4)


def test_hooks_leave_the_pairs_out_and_the_rest_alone(model, vpd, tokens):
    pairs = [(f"{Q}:1", f"{K}:3"), (f"{Q}:2", "bias")]
    terms = score_terms(vpd, model, tokens, 1, pairs)
    put = terms.without().detach()
    expected = model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_attn_scores", lambda s, hook: put)])
    clean = model(tokens)
    with vpd.attach(model):
        hooks = pair_ablation_hooks(vpd, model, pairs)
        assert_close(model.run_with_hooks(tokens, fwd_hooks=hooks), expected, rtol=0, atol=1e-6)
        halves = [hook for _ in range(2) for hook in pair_ablation_hooks(vpd, model, pairs, amount=0.5)]
        assert_close(model.run_with_hooks(tokens, fwd_hooks=halves), expected, rtol=0, atol=1e-6)
        assert_close(model(tokens), clean, rtol=0, atol=0)
    assert not torch.allclose(expected, clean, atol=1e-4)
    assert_close(pattern_of(terms.without()).sum(-1), torch.ones(2, 2, 7, dtype=torch.float64))


def test_hooks_see_the_masks_before_them(model, vpd, tokens):
    """With every Q and K mask at m, a pair's summand is m_c m_c' of what it was."""
    pairs = [(f"{Q}:1", f"{K}:3")]
    strength = score_terms(vpd, model, tokens, 1, pairs).strengths[0]
    m = {site: draw(6, seed=i) for i, site in enumerate((Q, K))}
    masks = Masks({site: SiteMask(mask.expand(2, 7, 6), None) for site, mask in m.items()})
    recorded = []
    name = "blocks.1.attn.hook_attn_scores"
    token_mask = (name, lambda s, hook: recorded.append(s.detach()))
    with vpd.attach(model), torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=[*vpd.mask_hooks(masks), token_mask])
        model.run_with_hooks(
            tokens, fwd_hooks=[*vpd.mask_hooks(masks), *pair_ablation_hooks(vpd, model, pairs), token_mask]
        )
    visible = unmasked(recorded[0])
    assert_close((recorded[0] - recorded[1])[visible], (m[Q][1] * m[K][3] * strength)[visible], rtol=0, atol=1e-9)


def test_hooks_refuse_what_they_cannot_do(model, vpd, tokens):
    with pytest.raises(RuntimeError, match="attached to none"):
        pair_ablation_hooks(vpd, model, [(f"{Q}:1", f"{K}:3")])
    with vpd.attach(model):
        with pytest.raises(ValueError, match=r"is not of blocks\.1\.attn\.W_K"):
            pair_ablation_hooks(vpd, model, [(f"{Q}:1", "blocks.0.attn.W_K:3")])
        with pytest.raises(ValueError, match="does not say of which block"):
            pair_ablation_hooks(vpd, model, [("bias", "bias")])
        with pytest.raises(IndexError, match="does not exist"):
            pair_ablation_hooks(vpd, model, [(f"{Q}:99", f"{K}:3")])
        hooks = pair_ablation_hooks(vpd, model, [(f"{Q}:1", f"{K}:3")], length=4)
        with pytest.raises(ValueError, match="give pair_ablation_hooks a larger length"):
            model.run_with_hooks(tokens, fwd_hooks=hooks)
        *_, (_, subtract) = hooks
        for _, read in hooks[:4]:
            read(torch.ones(1, 1, 6), None)
        with pytest.raises(ValueError, match="cannot be left out with a KV cache"):
            subtract(torch.zeros(1, 2, 1, 4), None)
        with pytest.raises(RuntimeError, match="before the activations of their pairs"):
            subtract(torch.zeros(1, 2, 1, 1), None)
        model.set_use_split_qkv_input(True)
        with pytest.raises(Unsupported, match="use_split_qkv_input"):
            pair_ablation_hooks(vpd, model, [(f"{Q}:1", f"{K}:3")])
        model.set_use_split_qkv_input(False)


def test_measuring_other_lengths_leaves_alibi_as_it_was():
    model, tokens = tiny_model(positional_embedding_type="alibi"), some_tokens()
    vpd = decomposition_of(model).double()
    before = own_scores(model, tokens)
    score_terms(vpd, model, tokens, 1)
    assert_close(own_scores(model, tokens), before, rtol=0, atol=0)


def test_nothing_is_left_on_the_model(model, vpd, tokens):
    hooks = {name: len(p._forward_hooks) for name, p in model.hook_dict.items()}
    flags = [p.requires_grad for p in model.parameters()]
    model.train()
    score_terms(vpd, model, tokens, 1)
    assert model.training and [p.requires_grad for p in model.parameters()] == flags
    assert {name: len(p._forward_hooks) for name, p in model.hook_dict.items()} == hooks
    assert all(p.grad is None for p in model.parameters())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(-5, 5), st.integers(1, 6))
def test_toeplitz_puts_each_offset_on_its_diagonal(n_query, n_key, low, n):
    values = torch.arange(1.0, n + 1)
    result = toeplitz(values, torch.arange(low, low + n), n_query, n_key)
    for t in range(n_query):
        for s in range(n_key):
            place = t - s - low
            assert result[t, s] == (values[place] if 0 <= place < n else 0)


def test_refused_pairs_leave_the_model_as_it_was():
    model = tiny_model(attn_scores_soft_cap=50.0)
    vpd, tokens = decomposition_of(model), some_tokens()
    before, hooks = model(tokens), len(list(model.hook_points()))
    with pytest.raises(Unsupported, match="scores are capped"):
        attention_by_offset(vpd, model, tokens, 1, ablate=[(f"{Q}:1", f"{K}:2")])
    for length in (tokens.shape[1], model.cfg.n_ctx):
        prompt = some_tokens(shape=(1, length))
        assert torch.equal(model(prompt), tiny_model(attn_scores_soft_cap=50.0)(prompt))
    assert torch.equal(model(tokens), before) and len(list(model.hook_points())) == hooks


def test_padding_on_either_side_gives_the_same_terms():
    model, vpd = bundled.model(), bundled.decomposition()
    prompts, results = ["import os", "def forward(self, x):\n    return x"], {}
    for side in ("left", "right"):
        model.tokenizer.padding_side = side
        terms = score_terms(vpd, model, prompts, 1)
        results[side] = terms.to_pandas()[["mean_size", "fraction"]].to_numpy()
        token_mask = adapt(model).padding(terms.tokens, None)
        assert token_mask is not None
        assert not terms.visible[(~token_mask)[:, None, :, None].expand_as(terms.visible)].any()
    assert results["left"] == pytest.approx(results["right"], rel=1e-4, abs=1e-6)
