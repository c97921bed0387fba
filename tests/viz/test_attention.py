"""Pictures of attention: what they hold, that they open offline, and what they refuse."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

from tl_vpd import bundled, viz
from tl_vpd.analysis import Component, attention
from tl_vpd.site import Subcomponent

Q, K = "blocks.0.attn.W_Q", "blocks.0.attn.W_K"
PAIRS = [(f"{Q}:77", f"{K}:48"), (f"{Q}:77", "bias")]


@pytest.fixture(scope="module")
def model():
    return bundled.model()


@pytest.fixture(scope="module")
def vpd():
    return bundled.decomposition()


@pytest.fixture(scope="module")
def tokens():
    return bundled.tokens("validation")[:2, :16]


def test_patterns_of_pairs_stand_beside_the_models(model, vpd, tokens, tmp_path):
    terms = attention.score_terms(vpd, model, tokens, 0, PAIRS)
    words = ["</script><b>", *"abcdefghijklmno"]
    panel = viz.pair_attention(terms, words, row=1, heads=[3, 0])
    given = json.loads(re.search(r"AttentionHeads, (\{.*\})\);", panel.scripts[0])[1])
    assert given["tokens"][0] == "</script><b>" and "</script><b>" not in panel.html
    kinds = ["model", "without", "pairs alone"]
    assert given["attentionHeadNames"] == [f"head {h}: {kind}" for h in (3, 0) for kind in kinds]
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    shown = torch.tensor(given["attention"])
    assert torch.allclose(shown[0], cache["pattern", 0][1, 3], atol=6e-4)
    assert torch.allclose(shown[4], terms.without()[1, 0].softmax(-1), atol=6e-4)
    assert torch.allclose(shown.sum(-1), torch.ones(6, 16), atol=0.01) and not torch.allclose(
        shown[0], shown[1], atol=0.01
    )
    saved = panel.save(tmp_path / "pairs.html").read_text(encoding="utf-8")
    assert "<script src" not in saved and "default-src 'none'" in saved


def test_patterns_that_cannot_be_drawn_are_refused(model, vpd, tokens):
    terms = attention.score_terms(vpd, model, tokens, 0, PAIRS)
    with pytest.raises(ValueError, match="no pairs"):
        viz.pair_attention(attention.score_terms(vpd, model, tokens, 0))
    with pytest.raises(ValueError, match="3 words for 16 tokens"):
        viz.pair_attention(terms, ["a", "b", "c"])
    with pytest.raises(IndexError, match="heads 0 to 3"):
        viz.pair_attention(terms, heads=[4])
    with pytest.raises(IndexError, match="no row 2"):
        viz.pair_attention(terms, row=2)


def test_strengths_by_offset(model, vpd, tokens):
    result = attention.static_strengths(vpd, model, tokens, 0, subcomponents=[f"{Q}:77", f"{Q}:60", f"{K}:48"])
    panel = viz.static_strengths(result)
    assert panel.body.count(f"{Q}:") == 2 and all(f"head {h}" in panel.body for h in range(4))
    assert viz.static_strengths(result).body == panel.body  # the same numbers, the same page
    one = viz.static_strengths(result, [(f"{Q}:60", f"{K}:48")], max_offset=5)
    assert f"{Q}:77" not in one.body
    with pytest.raises(KeyError, match="is not among the 2 x 1 pairs"):
        viz.static_strengths(result, [(f"{Q}:1", f"{K}:48")])


def test_norms_by_head(vpd):
    norms = attention.head_norms(vpd, 0)
    panel = viz.head_norms(norms, top=3)
    assert panel.body.count("<tr>") == 4 * 4 and ">:77<" in panel.body
    largest = float(norms[Q][77].max())
    assert f"{largest:.3g}" in panel.body
    with pytest.raises(ValueError, match="top=0: give an integer of at least 1"):
        viz.head_norms(norms, top=0)


def test_attention_by_offset(model, vpd, tokens):
    result = attention.attention_by_offset(vpd, model, tokens, 0, ablate=[f"{Q}:77"], max_offset=5)
    panel = viz.attention_by_offset(result)
    assert f"{Q}:77" in panel.body and "left out" in panel.body and panel.body.count("stroke-dasharray") >= 4
    alone = viz.attention_by_offset(attention.attention_by_offset(vpd, model, tokens, 0, max_offset=5))
    assert "left out" not in alone.body


def window_of(panel: viz.Panel) -> dict[str, Any]:
    """What the first block of a panel draws."""
    (window,) = json.loads(re.fullmatch(r"tlVpdDraw\((\{.*\})\)", panel.scripts[0])[1]).values()
    return window


def test_tokens_by_importance(model, vpd, tokens, tmp_path):
    panel = viz.importances(vpd, model, tokens[:1], [f"{Q}:77"])
    window = window_of(panel)
    ci = vpd.causal_importances(model, tokens[:1])
    assert window["values"] == pytest.approx(ci[Q][0, :, 77].tolist(), abs=1e-4)
    acts = vpd.component_acts(model, tokens[:1])[Q][0, :, 77] * vpd.U[Q][77].norm()
    assert all(
        f"activation {a:.3g}".replace("-", "−") in about
        for a, about in zip(acts.tolist(), window["about"], strict=True)
    )
    component = Component(7, (Subcomponent(Q, 77), Subcomponent(Q, 3)), (1, 0), 1, 1.0)
    panel = viz.importances(vpd, model, tokens[:1], [component])
    expected = torch.nn.functional.pad(ci[Q][0, :-1, 77], (1, 0)).maximum(ci[Q][0, :, 3])
    assert "component:7" in panel.body and window_of(panel)["values"] == pytest.approx(expected.tolist(), abs=0.001)
    members = viz.importances(vpd, model, tokens[:1], component)  # the sequence of its members
    assert members.body.count('class="window"') == 2
    several = viz.importances(vpd, model, tokens[:1], k=3)
    assert several.body.count('class="window"') == 3
    assert "<script src" not in several.save(tmp_path / "tokens.html").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="one is shown at a time"):
        viz.importances(vpd, model, tokens)
