from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from tests.tiny import tiny_model
from tl_vpd import bundled
from tl_vpd.recipe import DataRecipe, ModelRecipe, Recipe, text_windows, usable_device


def test_example_recipe_is_valid():
    path = Path(__file__).parent.parent / "examples" / "recipe.yaml"
    recipe = Recipe.read(path)
    assert recipe.vpd.init == "channels" and recipe.vpd.minimality.warm_up == 0.3
    assert recipe.model.name == "bundled" and recipe.saving.folder == Path("runs/example")


def test_tokens_from_files(tmp_path: Path):
    model = tiny_model()
    rows = np.arange(40, dtype=np.int32).reshape(4, 10) % 11
    np.save(tmp_path / "rows.npy", rows)
    save_file({"training": rows.astype(np.uint16)}, tmp_path / "rows.safetensors")
    for name in ("rows.npy", "rows.safetensors"):
        result = DataRecipe(tokens=str(tmp_path / name), context=6).first(model, 3)
        assert torch.equal(result, torch.from_numpy(rows[:3, :6].astype(np.int64)))
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


def test_a_file_larger_than_memory_is_not_read(tmp_path: Path):
    """A sparse file of 2^41 bytes: reading it in full would end the test run."""
    path = tmp_path / "large.npy"
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint16, shape=(2**30, 1024))
    rows[2**29, :3] = (1, 2, 3)
    del rows
    assert path.stat().st_size > 2**41
    result = DataRecipe(tokens=str(path), context=6).load(tiny_model())
    assert isinstance(result, np.memmap)
    assert result.shape == (2**30, 6)
    assert result[2**29].tolist() == [1, 2, 3, 0, 0, 0]


def test_sections_can_be_changed_value_by_value_and_what_is_not_allowed_is_named():
    changed = Recipe(vpd={"gamma": {"n_blocks": 3}}).changed(
        execution={"micro_batch": 2, "sharding": None}, vpd={"C": None, "gamma": {"d_ci": 64, "n_blocks": None}}
    )
    assert (changed.execution.micro_batch, changed.execution.sharding) == (2, "none")
    assert (changed.vpd.C, changed.vpd.gamma.d_ci, changed.vpd.gamma.n_blocks) == (None, 64, 3)
    assert Recipe(vpd={"C": {"*": 3}}).changed(vpd={"C": 5}).vpd.C == 5
    with pytest.raises(ValueError, match=r"execution\.sharding: Input should be 'none', 'optimizer' or 'full'"):
        changed.changed(execution={"sharding": "most"})


def test_cuda_is_the_device_of_each_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert usable_device("cuda") == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [usable_device(d) for d in ("cuda", "cpu", "cuda:1")] == ["cuda:3", "cpu", "cuda:1"]


def test_a_recipe_without_a_folder_is_not_trained():
    with pytest.raises(ValueError, match=r"saving\.folder is missing: name the folder"):
        Recipe().train()


def test_a_key_where_there_are_no_tensors_by_name_is_refused(tmp_path: Path):
    np.save(tmp_path / "rows.npy", np.zeros((2, 3), dtype=np.int64))
    with pytest.raises(ValueError, match=r"data\.key is 'training', and .*rows\.npy has no tensors by name"):
        DataRecipe(tokens=str(tmp_path / "rows.npy"), key="training").load(tiny_model())


def test_the_default_key_depends_on_what_the_tokens_are_for():
    model = bundled.model()
    validation = DataRecipe().first(model, 2, default_key="validation")
    assert torch.equal(validation, bundled.tokens("validation")[:2])
    assert torch.equal(DataRecipe().first(model, 2), bundled.tokens("training")[:2])
    assert torch.equal(DataRecipe(key="validation").first(model, 2), validation)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged, or not a .npy file of numbers"),
        (b"garbage", "damaged, or not a .npy file of numbers"),
    ],
)
def test_damaged_arrays_are_named(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "rows.npy").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        DataRecipe(tokens=str(tmp_path / "rows.npy")).load(tiny_model())


def test_several_arrays_and_text_of_another_encoding_are_refused(tmp_path: Path):
    for i in range(2):
        np.save(tmp_path / f"shard-{i}.npy", np.zeros((2, 3), dtype=np.int64))
    with pytest.raises(ValueError, match="matches 2 files of arrays: give one"):
        DataRecipe(tokens=str(tmp_path / "shard-*.npy")).load(tiny_model())
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.txt is not UTF-8 text"):
        DataRecipe(tokens=str(tmp_path / "latin.txt")).load(bundled.model())


def test_devices_and_options_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="device is 'gpu': give cpu, cuda"):
        ModelRecipe(device="gpu").load()
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="PyTorch sees no GPU on this machine"):
            ModelRecipe(device="cuda").load()
    with pytest.raises(ValueError, match=r"model.options \(fold_ln\): the bundled model takes none"):
        ModelRecipe(options={"fold_ln": False}).load()


def test_a_key_that_is_no_name_is_refused(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text("1: 2\n")
    with pytest.raises(ValueError, match=r"recipe\.yaml: "):
        Recipe.read(tmp_path / "recipe.yaml")
