from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as torch_save

from tests.tiny import tiny_model
from tl_vpd import bundled
from tl_vpd.adapters.versions import HookedTransformer
from tl_vpd.recipe import DataRecipe, ModelRecipe, Recipe, text_windows, usable_device


def test_example_recipe_is_valid():
    path = Path(__file__).parent.parent / "examples" / "recipe.yaml"
    recipe = Recipe.read(path)
    assert recipe.vpd.init == "channels" and recipe.vpd.coefficients.schedule["frequency"] == ((0, 0), (0.3, 1))
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
    save_file({"training": np.zeros((2, 3), dtype=np.float16)}, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match=r"holds float16 of shape \(2, 3\); integers \[n, pos\] are needed"):
        DataRecipe(tokens=str(tmp_path / "half.safetensors")).load(model)
    torch_save({"training": torch.zeros(2, 3, dtype=torch.bfloat16)}, tmp_path / "bf.safetensors")
    with pytest.raises(ValueError, match=r"holds bfloat16 of shape \(2, 3\); integers \[n, pos\] are needed"):
        DataRecipe(tokens=str(tmp_path / "bf.safetensors")).load(model)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "rows.safetensors").read_bytes()[:30])
    with pytest.raises(ValueError, match="not an intact safetensors file"):
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
    with pytest.raises(ValueError, match=r"execution\.sharding='most': Input should be 'none', 'optimizer' or 'full'"):
        changed.changed(execution={"sharding": "most"})


def test_cuda_is_the_device_of_each_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tl_vpd.recipe.model.device_of", torch.device)
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
    [(b"", "damaged, or not a .npy file of numbers"), (b"garbage", "damaged, or not a .npy file of numbers")],
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
    with pytest.raises(ValueError, match=r"latin.txt is not UTF-8 text .*: save it as UTF-8"):
        DataRecipe(tokens=str(tmp_path / "latin.txt")).load(bundled.model())
    for encoding, message in (("utf-16", "is UTF-16 text: save it"), ("utf-16-le", "has zero bytes, so it is UTF-16")):
        (tmp_path / "wide.txt").write_bytes(("import os\n" * 40).encode(encoding))
        with pytest.raises(ValueError, match=rf"wide\.txt {message}"):
            DataRecipe(tokens=str(tmp_path / "wide.txt")).load(bundled.model())


def test_pipes_and_devices_are_refused_and_folders_are_not_files(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for name in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(ValueError, match="is a device, a socket or a pipe: give an ordinary file"):
            DataRecipe(tokens=str(name)).load(tiny_model())
    with pytest.raises(FileNotFoundError, match="No file matches"):
        DataRecipe(tokens=str(tmp_path)).load(tiny_model())
    with pytest.raises(FileNotFoundError, match="pipe is not an ordinary file"):
        Recipe.read(tmp_path / "pipe")
    np.savez(tmp_path / "several.npz", a=np.zeros((2, 3)))
    (tmp_path / "several.npz").rename(tmp_path / "several.npy")
    with pytest.raises(ValueError, match=r"several\.npy is an archive of several arrays"):
        DataRecipe(tokens=str(tmp_path / "several.npy")).load(tiny_model())


def test_devices_and_options_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="device='gpu' is not a device of this PyTorch and machine"):
        ModelRecipe(device="gpu").load()
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device='cuda' is not a device of this PyTorch and machine"):
            ModelRecipe(device="cuda").load()
    with pytest.raises(ValueError, match=r"model.options \(fold_ln\): the bundled model takes none"):
        ModelRecipe(options={"fold_ln": False}).load()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1: 2\n", "the key 1 is not a name, put it in quotes (line 1)."),
        ("vpd: {steps: 3}\nsaving: {folder: x}\nvpd: {steps: 4}\n", "the key 'vpd' is there twice (line 3)."),
        ("vpd: {steps: 3, steps: 4}\n", "the key 'steps' is there twice (line 1)."),
        ("vpd: &v {steps: 3}\n", "anchors and aliases (& and *) are not read, write the values out (line 1)."),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n", "anchors and aliases"),
        ("model: {name: !!python/object/apply:os.system [true]}\n", "os.system' is not read, write a plain value"),
        ("vpd: {seed: " + "9" * 5000 + "}\n", "has a number that cannot be read"),
        ("vpd: " + "[" * 5000 + "\n", "is nested too deeply to be a recipe."),
        ("vpd: {steps: 3\n", "is not YAML: expected ',' or '}'"),
        ("", "is empty; keys model, data, vpd (or targeted), execution and saving are needed."),
        ("- vpd\n", "holds a list; keys"),
        ("vpd: {merged: yes}\n", "vpd.merged='yes': Input should be a valid number."),
        ("vpd: {steps: 1e3}\n", "vpd.steps=1000.0: Input should be a valid integer."),
        ("vpd: {optimizer: {lr: .nan}}\n", "vpd.optimizer.lr=nan: Input should be a finite number."),
        ("vpd: {adversary: {betas: [0.5, 1.0]}}\n", "vpd.adversary.betas.1=1.0: Input should be less than 1."),
        ("vpd: {seed: 20000000000000000000}\n", "vpd.seed=20000000000000000000: Input should be less than or equal to"),
        ("vpd: {steps: true}\n", "vpd.steps=True: Input should be a valid integer."),
        (
            "execution: {precision: float16}\n",
            "execution.precision='float16': Input should be 'float32' or 'bfloat16'.",
        ),
        ("model: {options: {trust_remote_code: true}}\n", "a recipe cannot let a model's own code run"),
        (
            "model: {options: {attn_implementation: someone/kernels}}\n",
            "'attn_implementation' is not an option of a recipe",
        ),
        ("model: {options: {fold_ln: [1]}}\n", "is a tuple: give a plain value."),
        ("model: {options: {dtype: int8}}\n", "dtype='int8': choose from 'float32'"),
    ],
)
def test_what_is_not_a_recipe_is_refused_when_it_is_read_in_one_sentence(tmp_path: Path, text: str, message: str):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError) as refused:
        Recipe.read(tmp_path / "recipe.yaml")
    said = str(refused.value)
    assert message in said and said.startswith(str(tmp_path / "recipe.yaml")), said
    assert said.endswith(".") and "\n" not in said


def test_numbers_and_words_are_what_they_look_like(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text(
        "data: {key: no}\nvpd: {optimizer: {lr: 1e-3}, steps: 20_000, merged: 0.5}\nsaving: {folder: 010}\n".replace(
            "010", "'010'"
        )
    )
    recipe = Recipe.read(tmp_path / "recipe.yaml")
    assert (recipe.data.key, recipe.vpd.optimizer.lr, recipe.vpd.steps, recipe.vpd.merged) == ("no", 1e-3, 20_000, 0.5)
    assert recipe.saving.folder == Path("010")
    for encoding in ("latin-1", "utf-16"):
        (tmp_path / "other.yaml").write_bytes("model: {name: café}\n".encode(encoding))
        with pytest.raises(ValueError, match=r"other\.yaml is .*UTF.*: save it as UTF-8\."):
            Recipe.read(tmp_path / "other.yaml")


MODULE = """
from pathlib import Path
from transformers import PretrainedConfig
Path("ran").touch()
class Mine(PretrainedConfig):
    model_type = "mine"
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(HookedTransformer is None, reason="only HookedTransformer lets code run by itself")
def test_a_models_code_runs_only_where_the_caller_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """TransformerLens asks for the code of models of this name without being told to."""
    folder = tmp_path / "microsoft" / "phi-2"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.Mine"}}')
    (folder / "configuration_mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    recipe = ModelRecipe(name="microsoft/phi-2", kind="hooked_transformer")
    with pytest.raises(ValueError, match=r"'microsoft/phi-2' comes with code that would run: pass --trust-remote-code"):
        recipe.load()
    assert not (tmp_path / "ran").exists()
    with pytest.raises(Exception):  # noqa: B017 (the folder has no weights; its code has run by then)
        recipe.load(trust_remote_code=True)
    assert (tmp_path / "ran").exists()


def test_a_folder_is_read_as_a_bridge():
    model = ModelRecipe(name=str(bundled.MODEL)).load()
    assert type(model).__name__ == "TransformerBridge"
    with bundled.decomposition().attach(model) as attached:  # the same weights
        assert attached


def test_a_targeted_recipe_trains_on_prompts_beside_ordinary_tokens(tmp_path):
    path = tmp_path / "recipe.yaml"
    settings = "steps: 2, batch_size: 2, C: 3, sites: blocks.1.mlp.*, gamma: {kind: global_mlp, hidden: 8}"
    path.write_text(
        f"data: {{tokens: bundled, context: 8}}\ntargeted: {{prompts: ['<a>', '<b><c>'], {settings}}}\n"
        f"saving: {{folder: {tmp_path / 'run'}}}\n"
    )
    run = Recipe.read(path).changed(execution={"micro_batch": 1}, data={"context": None}).train()
    assert run.finished and run.decomposition.record["targeted"]["target"]["rows"] == 2
    with pytest.raises(ValueError, match="A plan is of a plain run"):
        Recipe.read(path).plan()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("targeted: {steps: 2}", "give prompts or target"),
        ("targeted: {prompts: [a], target: {tokens: bundled}}", "give prompts or target"),
        ("targeted: {prompts: ['']}", "empty prompt"),
        ("targeted: {prompts: [a]}\nvpd: {steps: 3}", "vpd would do nothing beside targeted"),
    ],
)
def test_targeted_recipes_that_say_too_much_or_too_little_are_refused(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Recipe.read(path)
