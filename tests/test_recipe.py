from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from tests.tiny import tiny_model
from tl_vpd import bundled
from tl_vpd.recipe import DataRecipe, Recipe, text_windows


def test_example_recipe_is_valid():
    path = Path(__file__).parent.parent / "examples" / "recipe.yaml"
    own = Recipe.read(path)
    assert own.algorithm.init == "channels"
    assert own.model.name == "bundled"


def test_tokens_from_files(tmp_path: Path):
    model = tiny_model()
    rows = np.arange(40, dtype=np.int32).reshape(4, 10) % 11
    np.save(tmp_path / "rows.npy", rows)
    save_file({"training": rows.astype(np.uint16)}, tmp_path / "rows.safetensors")
    for name in ("rows.npy", "rows.safetensors"):
        found = DataRecipe(tokens=str(tmp_path / name), context=6).load(model)
        assert torch.equal(found, torch.from_numpy(rows[:, :6].astype(np.int64)))
    with pytest.raises(ValueError, match="has no tensor 'other'"):
        DataRecipe(tokens=str(tmp_path / "rows.safetensors"), key="other").load(model)
    np.save(tmp_path / "floats.npy", np.zeros((2, 3)))
    with pytest.raises(ValueError, match="integers"):
        DataRecipe(tokens=str(tmp_path / "floats.npy")).load(model)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "rows.safetensors").read_bytes()[:30])
    with pytest.raises(ValueError, match="damaged"):
        DataRecipe(tokens=str(tmp_path / "cut.safetensors")).load(model)


def test_text_becomes_windows_opened_by_bos(tmp_path: Path):
    model = bundled.model()
    text = "import os\n\n\ndef close(self):\n    self.file.close()\n" * 4
    (tmp_path / "a.txt").write_text(text)
    rows = DataRecipe(tokens=str(tmp_path / "*.txt"), context=16).load(model)
    ids = model.to_tokens(text, prepend_bos=False)[0]
    assert rows.shape == (len(ids) // 15, 16)
    assert (rows[:, 0] == model.tokenizer.bos_token_id).all()
    assert torch.equal(rows[:, 1:].flatten(), ids[: rows.shape[0] * 15])
    with pytest.raises(ValueError, match="as long as one window"):
        text_windows(model, ["x"], 16)
    with pytest.raises(ValueError, match="no tokenizer"):
        text_windows(tiny_model(), ["x"], 8)
