"""The command line, on the bundled model and runs of two steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tl_vpd import Decomposition
from tl_vpd.cli import app

ALGORITHM = "{steps: 2, batch_size: 2, C: 4, gamma: {d_ci: 8, n_blocks: 1, n_heads: 2}, warm_up_steps: 2}"


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def recipe(folder: Path, **parts: str) -> Path:
    lines = {"algorithm": ALGORITHM, "data": "{context: 16}", "output": f"{{folder: {folder / 'run'}}}", **parts}
    path = folder / "recipe.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
    return path


def test_train_then_eval(tmp_path: Path):
    own = recipe(tmp_path)
    trained = call("train", own)
    assert trained.exit_code == 0, trained.output
    folder = tmp_path / "run" / "decomposition"
    assert Decomposition.load(folder).packing.total == 12 * 4
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    evaluated = call("eval", folder, "--rows", 1, "--budgets", "1,2", "--out", tmp_path / "metrics.json")
    assert evaluated.exit_code == 0, evaluated.output
    assert "stochastic" in evaluated.output
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert set(record["pgd_kl"]) == {"1", "2"}
    assert record["tokens"] == 128
    assert set(record["controls"]) == {"random", "singular"}
    again = call("train", own)
    assert again.exit_code == 2
    assert "holds a run already" in again.output
    assert call("train", own, "--resume").exit_code == 0


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"algorithm": "{stepz: 2}"}, "algorithm.stepz"),
        ({"algorithm": "{steps: 0}"}, "algorithm.steps"),
        ({"algorithm": "{C: 0}"}, "at least one subcomponent"),
        ({"algorithm": "{sites: [blocks.7.*]}"}, "No site matches 'blocks.7.*'"),
        ({"data": "{tokens: nowhere/*.txt}"}, "No file matches"),
        ({"data": "{key: test}"}, "'training' and 'validation'"),
        ({"modle": "{}"}, "modle"),
    ],
)
def test_mistakes_in_a_recipe_end_in_one_sentence(tmp_path: Path, parts: dict[str, str], message: str):
    found = call("train", recipe(tmp_path, **parts))
    assert found.exit_code == 2
    assert message in found.output
    assert "Traceback" not in found.output
    assert not (tmp_path / "run").exists()


def test_missing_and_broken_files(tmp_path: Path):
    assert "does not exist" in call("train", tmp_path / "no.yaml").output
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert "holds a list" in call("train", tmp_path / "list.yaml").output
    (tmp_path / "broken.yaml").write_text("a: [")
    assert "is not YAML" in call("train", tmp_path / "broken.yaml").output
    found = call("eval", tmp_path)
    assert found.exit_code == 2
    assert "no decomposition" in found.output
    assert "whole numbers" in call("eval", "bundled", "--budgets", "few").output


def test_demo_refuses_a_folder_it_cannot_write_before_it_starts(tmp_path: Path):
    (tmp_path / "file").write_text("")
    found = call("demo", "--out", tmp_path / "file" / "demo")
    assert found.exit_code == 2
    assert "The bundled model" not in found.output
