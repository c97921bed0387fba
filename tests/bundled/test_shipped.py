"""What ships is what its records say, and good enough."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer, GPTNeoXForCausalLM

from tl_vpd import Decomposition, EvaluationConfig, bundled, evaluate
from tl_vpd.bundled.recipe import CONFIG, SETTLING
from tl_vpd.evaluation.batch import ce_by_row


@pytest.fixture(scope="module")
def shipped():
    return bundled.model(), bundled.decomposition()


def test_sizes():
    folder = bundled.MODEL.parent
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 15e6
    assert bundled.tokens("validation").shape == (256, 128)
    assert bundled.tokens("training").shape == (2000, 128)


def test_model_is_worth_taking_apart():
    quality = json.loads((bundled.MODEL / "quality.json").read_text())
    assert quality["trigram_ce"] - quality["validation_ce"] >= 0.3
    assert quality["name_first_nats"] - quality["name_second_nats"] >= 1.0
    assert quality["bracket_accuracy"] >= 0.9


def test_model_has_its_recorded_cross_entropy(shipped):
    model, _ = shipped
    tokens = bundled.tokens("validation")
    with torch.no_grad():
        ce = sum(ce_by_row(model(t), t, None).mean for t in tokens.split(64)) / 4
    assert ce == pytest.approx(json.loads((bundled.MODEL / "quality.json").read_text())["validation_ce"], abs=1e-4)
    assert bundled.training_record()["curve"][-1][1] == pytest.approx(float(ce), abs=0.05)


def test_hooked_model_agrees_with_transformers(shipped):
    model, _ = shipped
    source = GPTNeoXForCausalLM.from_pretrained(bundled.MODEL)
    tokens = bundled.tokens("validation")[:4]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), source(tokens).logits, rtol=0, atol=2e-4)


def test_strings_are_tokenised_as_the_windows_were(shipped):
    model, _ = shipped
    tokenizer = AutoTokenizer.from_pretrained(bundled.MODEL)
    text = "def close(self):\n    self.file.close()\n"
    tokens = model.to_tokens(text)[0].tolist()
    assert tokens == [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
    assert tokenizer.decode(tokens[1:]) == text
    row = bundled.tokens("validation")[0]
    assert int(row[0]) == tokenizer.bos_token_id
    assert model.to_tokens(model.to_string(row[1:60]))[0].tolist()[1:-3] == row[1:57].tolist()


def test_decomposition_holds_what_its_metrics_say(shipped):
    """On a quarter of the tokens, within what a quarter may differ."""
    model, vpd = shipped
    record = bundled.evaluation().record
    found = evaluate(
        vpd, model, bundled.tokens("validation")[:16], EvaluationConfig(budgets=(), controls=False, measures=())
    ).record
    assert found["unmasked_ce"] - found["target_ce"] <= 0.005
    assert found["l0"] == pytest.approx(record["l0"], rel=0.1)
    for row in ("stochastic", "rounded"):
        above, recorded = (r[f"{row}_ce"] - r["target_ce"] for r in (found, record))
        assert above == pytest.approx(recorded, abs=0.05)


def test_a_folder_that_holds_no_whole_model_is_named(tmp_path):
    shutil.copy(bundled.MODEL / "config.json", tmp_path)
    for content in (None, "{"):
        if content is not None:
            (tmp_path / "config.json").write_text(content)
        with pytest.raises(OSError, match=rf"^folder='{tmp_path}' cannot be read as a model: [^\n]*\.$"):
            bundled.model(folder=tmp_path)


def test_controls_come_out_far_worse():
    record = bundled.evaluation().record
    kl = record["kl"]["rounded"]
    assert record["controls"]["random"]["kl"]["rounded"] > 5 * kl
    assert record["controls"]["singular"]["kl"]["rounded"] > 2 * kl


def test_exact_and_loaded_like_any_other(shipped, tmp_path):
    model, vpd = shipped
    tokens = bundled.tokens("validation")[:2]
    with torch.no_grad():
        clean = model(tokens)
        with vpd.attach(model) as attached, attached.masked("unmasked", delta=1.0):
            assert torch.equal(model(tokens), clean)
    again = Decomposition.load(vpd.save(tmp_path / "copy"))
    for a, b in zip(vpd.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_its_record_is_the_recipe(shipped):
    _, vpd = shipped
    assert vpd.record["training"] == SETTLING.model_dump(mode="json")
    assert vpd.record["start"]["training"] == CONFIG.model_dump(mode="json")


def test_the_same_folder_boots_as_a_bridge(shipped):
    from transformer_lens.model_bridge import TransformerBridge

    model, _ = shipped
    bridge = TransformerBridge.boot_transformers(str(bundled.MODEL), device="cpu")
    tokens = bundled.tokens("validation")[:2]
    with torch.no_grad():
        torch.testing.assert_close(bridge(tokens), model(tokens), rtol=0, atol=2e-4)
