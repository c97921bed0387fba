"""The command line, on the bundled model and runs of two steps."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from tl_vpd import Decomposition, ExecutionConfig, VPDConfig, bundled
from tl_vpd.cli import app
from tl_vpd.evaluation import feature_splitting
from tl_vpd.files import tensor_file
from tl_vpd.files.lock import locked
from tl_vpd.planning import Target, TransformerShape, footprint
from tl_vpd.recipe import ModelRecipe, Recipe

ROOT = Path(__file__).parents[1]
VPD = "{steps: 2, batch_size: 2, C: 4, gamma: {d_ci: 8, n_blocks: 1, n_heads: 2}, faithfulness: {warm_up_steps: 2}}"


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def recipe(folder: Path, **sections: str) -> Path:
    lines = {"vpd": VPD, "data": "{context: 16}", "saving": f"{{folder: {folder / 'run'}}}", **sections}
    path = folder / "recipe.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
    return path


def test_train_then_eval(tmp_path: Path):
    recipe_file = recipe(tmp_path)
    trained = call("train", recipe_file)
    assert trained.exit_code == 0, trained.output
    folder = tmp_path / "run" / "decomposition"
    assert Decomposition.load(folder).site_axis.total == 12 * 4
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    evaluated = call("eval", folder, "--rows", 1, "--budgets", "1,2", "--out", tmp_path / "metrics.json")
    assert evaluated.exit_code == 0, evaluated.output
    assert "stochastic" in evaluated.output
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert set(record["pgd_kl"]) == {"1", "2"}
    assert record["tokens"] == 128
    assert set(record["controls"]) == {"random", "singular", "shuffled", "untrained"}
    again = call("train", recipe_file)
    assert again.exit_code == 2
    assert "contains a run: pass resume" in again.output
    assert call("train", recipe_file, "--resume").exit_code == 0


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"vpd": "{stepz: 2}"}, "VPDConfig has no 'stepz' (did you mean 'steps'?)"),
        ({"vpd": "{steps: 0}"}, "vpd.steps"),
        ({"vpd": "{C: 0}"}, "at least one subcomponent"),
        ({"vpd": "{sites: [blocks.7.*]}"}, "No site matches 'blocks.7.*'"),
        ({"data": "{tokens: nowhere/*.txt}"}, "No file matches"),
        ({"data": "{key: test}"}, "choose from 'training', 'validation'"),
        ({"modle": "{}"}, "modle"),
        ({"saving": "{log_every: 5}"}, "saving.folder is missing"),
        ({"execution": "{micro_batches: 2}"}, "ExecutionConfig has no 'micro_batches' (did you mean 'micro_batch'?)"),
        ({"execution": "{sharding: most}"}, "execution.sharding='most': Input should be 'none', 'optimizer' or 'full'"),
        ({"saving": "{keep_states: 0}"}, "saving.keep_states"),
        ({"data": "{contxt: 8}"}, "DataRecipe has no 'contxt' (did you mean 'context'?)"),
    ],
)
def test_mistakes_in_a_recipe_end_in_one_sentence(tmp_path: Path, parts: dict[str, str], message: str):
    result = call("train", recipe(tmp_path, **parts))
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "run").exists()


def test_options_of_train_reach_the_run(tmp_path: Path):
    np.save(tmp_path / "rows.npy", np.arange(60, dtype=np.uint16).reshape(3, 20))
    recipe_file = recipe(
        tmp_path,
        data=f"{{tokens: {tmp_path / 'rows.npy'}, context: 9}}",
        saving=f"{{folder: {tmp_path / 'run'}, save_every: 1}}",
    )
    trained = call("train", "--micro-batch", 1, "--context", 8, "--keep-states", 1, "--sharding", "full", recipe_file)
    assert trained.exit_code == 0, trained.output
    assert [p.name for p in (tmp_path / "run" / "state").iterdir()] == ["step-00000002.safetensors"]
    assert json.loads((tmp_path / "run" / "tokens.json").read_text())["context"] == 8
    assert load_file(tmp_path / "run" / "state" / "step-00000002.safetensors")["sources/values"].shape[:2] == (2, 8)


def test_under_torchrun_the_first_process_writes_and_speaks_alone(tmp_path: Path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    assert call("train", recipe(one)).exit_code == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, "-m", "tl_vpd.cli", "train", str(recipe(two, execution="{sharding: full}"))],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Finished:") == 1
    first, *_, last = done.stdout.splitlines()
    assert first.startswith("Decomposing 12 sites into ") and last == f"Finished: {two / 'run' / 'decomposition'}"
    assert done.stdout.count("Decomposing ") == done.stdout.count("Ablating ") == 1
    a, b = (load_file(f / "run" / "decomposition" / "decomposition.safetensors") for f in (one, two))
    assert a.keys() == b.keys()
    assert all(float((a[k] - b[k]).abs().gt(1e-4).float().mean()) < 0.05 for k in a)
    again = subprocess.run(
        [*launcher, "-m", "tl_vpd.cli", "train", str(tmp_path / "two" / "recipe.yaml")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert again.returncode != 0
    assert again.stderr.count("contains a run: pass resume") == 1


NUMBERS = ("--layers", 2, "--d-model", 8, "--heads", 2, "--d-mlp", 12, "--vocabulary", 11)


def test_plan_prints_the_footprint_of_numbers():
    result = call("plan", *NUMBERS, "--C", 5, "--d-ci", 8, "--batch-size", 4, "--context", 6, "--tflops", 0.001)
    assert result.exit_code == 0, result.output
    target = Target.of(TransformerShape(layers=2, d_model=8, heads=2, d_mlp=12, vocabulary=11))
    expected = footprint(target, VPDConfig(C=5, gamma={"d_ci": 8}, batch_size=4), context=6)
    rows = [line.split() for line in result.output.splitlines()]
    assert ["step", str(round(expected.step_flops / 1e9, 3))] in rows
    assert f"components: {expected.counts['components']:,}, gamma: {expected.counts['gamma']:,}" in result.output
    assert f"The matrix products of a step take {expected.step_flops / 1e9:.3g} s" in result.output
    half = call("plan", *NUMBERS, "--context", 6, "--batch-size", 4, "--processes", 2, "--sharding", "full")
    assert half.exit_code == 0, half.output


def test_plan_takes_a_recipe_and_loads_its_model(tmp_path: Path):
    recipe_file = recipe(tmp_path, execution="{micro_batch: 1}")
    result = call("plan", recipe_file)
    assert result.exit_code == 0, result.output
    model = bundled.model()
    config = Recipe.read(recipe_file).vpd
    expected = footprint(Target.of(model), config, context=16, execution=ExecutionConfig(micro_batch=1))
    assert f"gamma: {expected.counts['gamma']:,}" in result.output
    assert "A step takes " in result.output and "The run fits." in result.output
    untimed = call("plan", recipe_file, "--limit", 0)
    assert "(no step was timed: two would take longer than 0 s)." in untimed.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Give a recipe, or the model's numbers too: --layers, --d-model"),
        (NUMBERS[:8], "numbers too: --vocabulary"),
        (NUMBERS, "Give --context"),
        ((*NUMBERS, "--context", 6, "--sharding", "most"), "execution.sharding"),
        (
            (*NUMBERS, "--context", 6, "--batch-size", 5, "--processes", 2),
            "batch_size 5 cannot be split among 2 processes",
        ),
        (("recipe.yaml", "--layers", 2), "does not exist"),
    ],
)
def test_plan_says_what_is_missing(arguments: tuple[object, ...], message: str):
    result = call("plan", *arguments)  # type: ignore[arg-type]
    assert result.exit_code == 2
    assert message in result.output


def test_feature_splitting_trains_each_size_and_writes_the_table(tmp_path: Path):
    result = call(
        "feature-splitting", recipe(tmp_path), "--factors", "0.5,2", "--rows", 1, "--out", tmp_path / "sizes.csv"
    )
    assert result.exit_code == 0, result.output
    table = pd.read_csv(tmp_path / "sizes.csv", index_col=0)
    assert table["built"].tolist() == [12 * 2, 12 * 8]
    for factor, C in (("0.5", 2), ("2", 8)):
        trained = Decomposition.load(tmp_path / "run" / f"C-{factor}" / "decomposition")
        assert set(trained.counts.values()) == {C}
    unseen = feature_splitting({"2": trained}, bundled.model(), bundled.tokens("validation")[:1, :16])
    assert table["stochastic_kl"].iloc[1] == pytest.approx(unseen["stochastic_kl"].iloc[0], rel=1e-5)
    assert "alive_growth" in result.output and "built" in result.output
    wrong = call("feature-splitting", tmp_path / "recipe.yaml", "--factors", "half")
    assert wrong.exit_code == 2 and "--factors 'half': give numbers with commas" in wrong.output
    missing = call("feature-splitting", tmp_path / "recipe.yaml", "--out", tmp_path / "nowhere" / "sizes.csv")
    assert missing.exit_code == 2 and "cannot be written" in missing.output


def test_the_version_is_printed_without_a_command():
    result = call("--version")
    assert result.exit_code == 0 and result.output == f"tl_vpd {version('tl_vpd')}\n"


def test_missing_and_broken_files(tmp_path: Path):
    assert "does not exist" in call("train", tmp_path / "no.yaml").output
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert "holds a list" in call("train", tmp_path / "list.yaml").output
    (tmp_path / "broken.yaml").write_text("a: [")
    assert "is not YAML" in call("train", tmp_path / "broken.yaml").output
    result = call("eval", tmp_path)
    assert result.exit_code == 2
    assert "is not a decomposition" in result.output
    assert "whole numbers" in call("eval", "bundled", "--budgets", "few").output


def test_demo_refuses_a_folder_it_cannot_write_before_it_starts(tmp_path: Path):
    (tmp_path / "file").write_text("")
    result = call("demo", "--out", tmp_path / "file" / "demo")
    assert result.exit_code == 2
    assert "The bundled model" not in result.output


def test_options_that_a_recipe_or_a_folder_rules_out_are_refused(tmp_path: Path):
    recipe_file = recipe(tmp_path)
    result = call("plan", recipe_file, "--itemsize", "8", "--gated", "--kv-heads", "1")
    assert result.exit_code == 2
    assert "names the model: leave out --kv-heads, --gated, --itemsize" in result.output.replace("\n", " ")
    assert "is a folder: give the name of a file" in call("eval", "bundled", "--out", tmp_path).output
    assert "is not a device of this PyTorch and machine" in call("eval", "bundled", "--device", "gpu").output


def test_a_folder_whose_name_looks_like_markup_is_printed_as_it_is(tmp_path: Path):
    folder = tmp_path / "a[" / "b]"
    result = call("train", recipe(tmp_path, saving=f"{{folder: '{folder}'}}"))
    assert result.exit_code == 0, result.output
    assert f"Finished: {folder / 'decomposition'}" in result.output


def test_a_damaged_state_is_named_and_the_one_before_resumes_to_the_same_result(tmp_path: Path):
    (tmp_path / "whole").mkdir()
    for folder in (tmp_path, tmp_path / "whole"):
        saving = f"{{folder: {folder / 'run'}, save_every: 1}}"
        assert call("train", recipe(folder, saving=saving)).exit_code == 0
    newest = tmp_path / "run" / "state" / "step-00000002.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"?")
    damaged = call("train", tmp_path / "recipe.yaml", "--resume")
    assert damaged.exit_code == 2 and len(damaged.output.splitlines()) == 1
    before = newest.with_name("step-00000001.safetensors")
    assert f"{newest} is not an intact training state" in damaged.output and f"--from-state {before}" in damaged.output
    resumed = call("train", tmp_path / "recipe.yaml", "--from-state", before)
    assert resumed.exit_code == 0, resumed.output
    a, b = (
        load_file(f / "run" / "decomposition" / "decomposition.safetensors") for f in (tmp_path, tmp_path / "whole")
    )
    assert all(torch.equal(a[key], b[key]) for key in a)
    nowhere = call("train", tmp_path / "recipe.yaml", "--from-state", tmp_path / "recipe.yaml")
    assert nowhere.exit_code == 2 and "is not a state of" in nowhere.output


def test_a_run_goes_on_from_a_decomposition(tmp_path: Path):
    assert call("train", recipe(tmp_path)).exit_code == 0
    first = tmp_path / "run" / "decomposition"
    (tmp_path / "next").mkdir()
    further = recipe(tmp_path / "next", saving=f"{{folder: {tmp_path / 'next' / 'run'}}}")
    result = call("train", further, "--from-decomposition", first)
    assert result.exit_code == 0, result.output
    vpd = Decomposition.load(tmp_path / "next" / "run" / "decomposition")
    assert vpd.record["start"] == Decomposition.load(first).record
    both = call("train", further, "--from-decomposition", first, "--resume")
    assert both.exit_code == 2 and "starts a new run: leave out --resume" in both.output


def test_a_folder_in_use_and_a_full_disk_are_one_line_and_exit_code_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe_file = recipe(tmp_path)
    with locked(tmp_path / "run"):
        used = call("train", recipe_file)
    assert used.exit_code == 2 and len(used.output.splitlines()) == 1  # nothing has been done
    assert f"{tmp_path / 'run'} is in use by process {os.getpid()} on" in used.output

    def full(path: Path, *content: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensor_file, "_write", full)
    result = call("train", recipe_file)
    last = result.output.splitlines()[-1]  # after the bar of the warm-up
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert f"No space left on the disk of {tmp_path / 'run' / 'state'}" in last


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "Interrupted; what was saved before is intact."),
        (RuntimeError("two\nlines"), 1, "RuntimeError: two lines (an error of the program or of a library: set TL_VPD"),
        (ValueError("two\nlines"), 2, "ValueError: two lines"),
        (KeyError("a sentence."), 2, "KeyError: a sentence."),
    ],
)
def test_every_error_is_one_line_with_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, said: str
):
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(Recipe, "train", fail)
    result = call("train", recipe(tmp_path))
    assert result.exit_code == code and len(result.output.splitlines()) == 1 and said in result.output
    if code < 3:
        monkeypatch.setenv("TL_VPD_TRACEBACK", "1")
        assert call("train", recipe(tmp_path)).exception is error


def test_a_models_code_is_trusted_on_the_command_line_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def load(self: ModelRecipe, *, trust_remote_code: bool = False) -> None:
        asked.append(trust_remote_code)
        raise ValueError("That is all.")

    monkeypatch.setattr(ModelRecipe, "load", load)
    recipe_file = recipe(tmp_path)
    for command in (
        ("train", recipe_file),
        ("plan", recipe_file),
        ("feature-splitting", recipe_file),
        ("eval", "bundled"),
    ):
        assert "That is all." in call(*command).output
        assert "That is all." in call(*command, "--trust-remote-code").output
    assert asked == [False, True] * 4
    refused = call("train", recipe(tmp_path, model="{options: {trust_remote_code: true}}"))
    assert refused.exit_code == 2 and "pass --trust-remote-code on the command line" in refused.output
