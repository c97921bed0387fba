"""Static and mean strengths, norms, OV overlap, keys and values, attention by offset: each against its formula written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from tests.tiny import decomposition_of, matrix_of, some_tokens, tiny_model
from tl_vpd.analysis.attention import (
    OVConfig,
    attention_by_offset,
    head_alignment,
    head_norms,
    mean_strengths,
    ov_overlap,
    random_overlap,
    score_terms,
    spread_over_heads,
    static_strengths,
    strongest_static,
    value_given_key,
)
from tl_vpd.analysis.attention.offsets import mean_by_offset
from tl_vpd.analysis.attention.ov import random_overlaps
from tl_vpd.analysis.attention.static import usual_signs

Q, K, V, OUT = (f"blocks.1.attn.W_{x}" for x in "QKVO")


def test_static_strengths_are_the_formula(model, vpd, tokens):
    result = static_strengths(vpd, model, tokens, 1)
    acts, ci = vpd.component_acts(model, tokens), vpd.causal_importances(model, tokens)
    attn = model.blocks[1].attn
    eye = torch.eye(4, dtype=torch.float64)[:, None, None].expand(-1, 7, 1, -1)
    R = attn.apply_rotary(eye)[:, :, 0].permute(1, 2, 0)  # [pos, out, in]
    sigma = {}
    for site in (Q, K):
        mean = (acts[site] * (ci[site] > 0)).sum((0, 1))
        sigma[site] = torch.where(mean < 0, -1.0, 1.0) * vpd.V[site].norm(dim=0)
    for c, d, head, offset in [(0, 1, 0, 0), (3, 2, 1, 4), (5, 5, 0, 6)]:
        u = sigma[Q][c] * vpd.U[Q][c].view(2, 4)[head]
        w = sigma[K][d] * vpd.U[K][d].view(2, 4)[head]
        expected = (R[6] @ u) @ (R[6 - offset] @ w)
        assert_close(result.values[c, d, head, offset], expected.detach(), rtol=0, atol=1e-6)
    assert result.values.shape == (6, 6, 2, 7)
    values = result.standardised.movedim(2, 0).flatten(1)
    assert_close(values.mean(1), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-6)
    assert_close(values.std(1, correction=0), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-6)


def test_some_pairs_are_the_same_pairs_of_all_and_the_strongest_are_the_strongest(model, vpd, tokens, monkeypatch):
    every = static_strengths(vpd, model, tokens, 1)
    some = static_strengths(vpd, model, tokens, 1, subcomponents=[f"{Q}:4", f"{K}:2", f"{Q}:1"], length=3)
    again = static_strengths(vpd, model, tokens, 1, length=3)
    assert_close(some.values, every.values[[4, 1]][:, [2], :, :3], rtol=0, atol=1e-9)
    assert_close(some.standardised, again.standardised[[4, 1]][:, [2]], rtol=0, atol=1e-9)
    monkeypatch.setattr("tl_vpd.analysis.attention.static.ENTRIES", 20)  # several blocks of queries and of keys
    best = strongest_static(vpd, model, tokens, 1, 7)
    whole = every.top(7)
    assert best[["query", "key", "head", "offset"]].equals(whole[["query", "key", "head", "offset"]])
    assert best["standardised"].tolist() == pytest.approx(whole["standardised"].tolist(), abs=1e-9)
    assert len(every.to_pandas()) == every.values.numel()


def test_usual_signs():
    acts = torch.tensor([[1.0, -2.0, 5.0], [-3.0, -1.0, 1.0]])
    important = torch.tensor([[1.0, 1.0, 0.0], [0.2, 0.0, 0.0]])
    assert usual_signs(acts, important).tolist() == [-1, -1, 1]
    assert usual_signs(acts, important, threshold=0.5).tolist() == [1, -1, 1]


@pytest.mark.parametrize("flags", [{}, dict(n_heads=4, n_key_value_heads=2, d_head=4)], ids=["all heads", "grouped"])
def test_mean_strengths_are_the_mean_of_the_summands(flags):
    model, tokens = tiny_model(**flags), some_tokens(shape=(3, 7))
    vpd = decomposition_of(model).double()
    mask = torch.ones_like(tokens)
    mask[1, :2] = 0
    result = mean_strengths(vpd, model, tokens, 1, attention_mask=mask)
    pairs = [(f"{Q}:1", f"{K}:5"), (f"{Q}:2", "bias"), ("bias", "bias")]
    terms = score_terms(vpd, model, tokens, 1, pairs, attention_mask=mask)
    at = [(1, 5), (2, 6), (6, 6)]
    assert result.queries[6] == "bias" and result.keys[5] == f"{K}:5"
    for (i, j), strengths in zip(at, terms.strengths, strict=True):
        for offset in (0, 1, 3):
            summands = [
                strengths[b, :, t, t - offset] for b in range(3) for t in range(offset, 7) if mask[b, t - offset]
            ]
            assert result.counts[offset] == len(summands)
            assert_close(result.values[i, j, :, offset], torch.stack(summands).mean(0), rtol=0, atol=1e-9)
    weights = result.counts.clone()
    weights[1] = 0
    others = (result.values[1, 5] * weights).sum(-1) / weights.sum()
    assert_close(result.contrast(1)[1, 5], result.values[1, 5, :, 1] - others, rtol=0, atol=1e-12)
    best = result.top(1, offset=1).iloc[0]
    assert best["contrast"] == pytest.approx(float(result.contrast(1).sum(-1).max()))
    assert result.heads(best["query"], best["key"], offset=1)["fraction"].sum() == pytest.approx(1)
    assert len(result.to_pandas(offset=2)) == result.values[..., 0].numel()
    with pytest.raises(IndexError, match="does not occur"):
        result.contrast(9)
    with pytest.raises(KeyError, match="is not among"):
        result.heads(f"{Q}:77", "bias", offset=1)


def test_norms_by_head(model, vpd):
    result = head_norms(vpd, 1)
    for site in (Q, K, V):
        expected = vpd.U[site][3].view(2, 4).norm(dim=1) * vpd.V[site][:, 3].norm()
        assert_close(result[site][3], expected.detach())
    assert_close(result[OUT][2], (vpd.V[OUT][:, 2].view(2, 4).norm(dim=1) * vpd.U[OUT][2].norm()).detach())
    table = result.to_pandas()
    assert len(table) == 24 and result.top(3, head=1)["head_1"].is_monotonic_decreasing
    with pytest.raises(KeyError, match="is not among these"):
        result["blocks.0.attn.W_Q"]
    with pytest.raises(KeyError, match="Nothing of block 7"):
        head_norms(vpd, 7)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=6))
def test_spread_is_between_one_head_and_all(norms):
    x = torch.tensor(norms)
    assert 1 - 1e-4 <= float(spread_over_heads(x)) <= len(norms) + 1e-4
    assert float(spread_over_heads(torch.full((5,), norms[0]))) == pytest.approx(5, rel=1e-4)
    assert float(spread_over_heads(torch.tensor([0.0, norms[0]]))) == pytest.approx(1, rel=1e-4)


def test_ov_overlap_is_that_of_the_papers_column_convention(model, vpd, tokens):
    result = ov_overlap(vpd, model, tokens, 1, config=OVConfig(draws=4))
    recorded = {}
    model.blocks[1].attn.register_forward_pre_hook(
        lambda m, a, k: recorded.update(x=k["value_input"]), with_kwargs=True
    )
    with torch.no_grad():
        model(tokens)
    x = recorded["x"].reshape(-1, 8)
    _, S, Zt = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    M = [(model.W_V[1, h] @ model.W_O[1, h]).T.detach() @ Zt.T @ torch.diag(S) for h in (0, 1)]

    def cosine(a, b):
        return float((a * b).sum() / a.norm() / b.norm())

    assert result.read[0, 1] == pytest.approx(cosine(M[0].T @ M[0], M[1].T @ M[1]), abs=1e-9)
    assert result.write[0, 1] == pytest.approx(cosine(M[0] @ M[0].T, M[1] @ M[1].T), abs=1e-9)
    W = [(model.W_V[1, h] @ model.W_O[1, h]).detach() for h in (0, 1)]
    assert result.raw[0, 1] == pytest.approx(cosine(*W), abs=1e-9)
    assert_close(result.read.diagonal(), torch.ones(2, dtype=torch.float64))
    assert result.tokens == 14 and len(result.to_pandas()) == len(result.top(5)) == 1


def test_ov_overlap_where_a_key_is_important(model, vpd, tokens):
    g = vpd.causal_importances(model, tokens)[K]
    key = int((g > 0).sum((0, 1)).argmin())
    count = int((g[..., key] > 0).sum())
    if count < 2:
        with pytest.raises(ValueError, match="at least two"):
            ov_overlap(vpd, model, tokens, 1, key=f"{K}:{key}")
        key = int((g > 0).sum((0, 1)).argmax())
        count = int((g[..., key] > 0).sum())
    assert ov_overlap(vpd, model, tokens, 1, config=OVConfig(draws=2), key=f"{K}:{key}").tokens == count


def test_random_overlaps_without_weights_are_the_closed_form():
    read, write = random_overlaps(torch.eye(24), 24, 6, draws=400, seed=0)
    assert read == pytest.approx(random_overlap(24, 6), abs=0.01)
    assert write == pytest.approx(random_overlap(24, 6), abs=0.01)
    steep = torch.diag(0.5 ** torch.arange(24.0))  # one direction dominates the data: all heads read it
    assert random_overlaps(steep @ steep, 24, 6, draws=100, seed=0)[0] > 0.8


def test_values_given_keys_are_counts(model, vpd, tokens):
    result = value_given_key(vpd, model, tokens, 1, threshold=0.2)
    ci = vpd.causal_importances(model, tokens)
    for k in range(6):
        for v in range(6):
            both = int(((ci[K][..., k] > 0.2) & (ci[V][..., v] > 0.2)).sum())
            keys = int((ci[K][..., k] > 0.2).sum())
            assert result.both[k, v] == both
            assert not keys or result.value_given_key[k, v] == pytest.approx(both / keys)
    table = result.to_pandas()
    row = table.iloc[0]
    share = float((ci[V][..., int(row["value"].rpartition(":")[2])] > 0.2).float().mean())
    assert row["lift"] == pytest.approx(row["value_given_key"] / share, rel=1e-5)
    assert len(result.top(3, min_both=1)) == 3


def test_alignment_with_heads(model, vpd):
    result = head_alignment(vpd, model, 1)
    W = [(model.W_V[1, h] @ model.W_O[1, h]).detach() for h in (0, 1)]
    for h in (0, 1):
        reads = (vpd.V[V][:, 4] @ W[h]).norm() * vpd.U[V][4].norm()
        writes = (W[h] @ vpd.U[OUT][3]).norm() * vpd.V[OUT][:, 3].norm()
        assert_close(result[V][4, h], reads.detach())
        assert_close(result[OUT][3, h], writes.detach())


def test_alignment_of_grouped_heads():
    model = tiny_model(n_heads=4, n_key_value_heads=2, d_head=4)
    vpd = decomposition_of(model).double()
    W_V, W_O = matrix_of(model, V).view(8, 2, 4), matrix_of(model, OUT).view(4, 4, 8)
    result = head_alignment(vpd, model, 1)
    expected = (vpd.V[V][:, 1] @ W_V[:, 1] @ W_O[3]).norm() * vpd.U[V][1].norm()
    assert_close(result[V][1, 3], expected.detach())


def test_attention_by_offset_before_and_after(model, vpd, tokens):
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    pair = (f"{Q}:2", f"{K}:1")
    result = attention_by_offset(vpd, model, tokens, 1, ablate=[f"{Q}:2"], attention_mask=mask)
    with torch.no_grad():
        _, clean = model.run_with_cache(tokens, attention_mask=mask)
        with vpd.attach(model) as attached, attached.ablated([f"{Q}:2"]):
            _, cache = model.run_with_cache(tokens, attention_mask=mask)
    for offset in (0, 2):
        for pattern, shown in ((clean["pattern", 1], result.before), (cache["pattern", 1], result.after)):
            paid = [pattern[b, :, t, t - offset] for b in range(2) for t in range(offset, 7) if mask[b, t - offset]]
            assert_close(shown[:, offset], torch.stack(paid).mean(0), rtol=0, atol=1e-9)
    assert result.ablated == (f"{Q}:2",) and len(result.to_pandas()) == 14 and len(result.top(3)) == 3
    alone = attention_by_offset(vpd, model, tokens, 1, ablate=[pair])
    terms = score_terms(vpd, model, tokens, 1, [pair])
    assert_close(alone.after, mean_by_offset(terms.without().softmax(-1), 16), rtol=0, atol=1e-6)
    assert attention_by_offset(vpd, model, tokens, 1).after is None
