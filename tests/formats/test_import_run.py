"""``tl-vpd import``: two folders of ours that need neither the run nor the network again."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import tl_vpd
from tests.formats.test_param_decomp import ANSWERS, RUN, TOKENS
from tests.marks import needs_bridge, needs_hooked_transformer
from tl_vpd.adapters.loading import load_model
from tl_vpd.cli import app
from tl_vpd.formats.param_decomp import import_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported") / "vpd"
    result = CliRunner().invoke(app, ["import", str(RUN), "--out", str(folder)])
    assert result.exit_code == 0, result.output
    assert "kl_ci" in result.output and "run's own" in result.output and f"Written: {folder} and" in result.output
    return folder


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("hooked_transformer", marks=needs_hooked_transformer),
        pytest.param("bridge", marks=needs_bridge),
    ],
)
def test_the_folders_are_the_run(folder, kind):
    before = sorted(p.name for p in (folder / "model").iterdir())
    model, vpd = load_model(str(folder / "model"), kind=kind), tl_vpd.Decomposition.load(folder)
    assert torch.allclose(model(TOKENS), ANSWERS["logits"], atol=2e-5)
    ci = vpd.causal_importances(model, TOKENS)
    assert torch.allclose(ci["blocks.1.mlp.W_out"], ANSWERS["ci/h.1.mlp.down_proj"], atol=1e-5)
    assert vpd.record["certificate"]["kl_ci"] < 0.5 and vpd.record["source"]["run"] == "p-00000001"
    assert sorted(p.name for p in (folder / "model").iterdir()) == before == ["config.json", "model.safetensors"]
    with pytest.raises(ValueError, match="is an imported model, which takes dtype and none of the other options"):
        load_model(str(folder / "model"), kind=kind, fold_ln=True)


def test_the_imported_folder_is_evaluated_on_the_command_line(folder, tmp_path):
    np.save(tmp_path / "tokens.npy", TOKENS.numpy())
    arguments = ["eval", str(folder), "--model", str(folder / "model"), "--tokens", str(tmp_path / "tokens.npy")]
    arguments += ["--budgets", "", "--measures", "none", "--no-controls", "--out", str(tmp_path / "metrics.json")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    answers = json.loads((RUN.parent / "answers.json").read_text())
    assert json.loads((tmp_path / "metrics.json").read_text())["kl"]["ci"] == pytest.approx(
        answers["kl_ci_masked"], abs=1e-5
    )


def test_tokens_and_dtype_on_the_command_line(tmp_path):
    np.save(tmp_path / "tokens.npy", TOKENS.numpy().astype(np.uint16))
    arguments = ["import", str(RUN), "--out", str(tmp_path / "vpd"), "--tokens", str(tmp_path / "tokens.npy")]
    result = CliRunner().invoke(app, [*arguments, "--rows", "2", "--dtype", "bfloat16"])
    assert result.exit_code == 0, result.output
    certificate = tl_vpd.Decomposition.load(tmp_path / "vpd").record["certificate"]
    assert (certificate["tokens"], certificate["rows"], certificate["length"]) == ("given", 2, TOKENS.shape[1])
    for file in ("decomposition.safetensors", "model/model.safetensors"):
        assert {t.dtype for t in load_file(tmp_path / "vpd" / file).values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "int8"], "--dtype='int8': choose from 'float32', 'float64', 'bfloat16', 'float16'."),
        (["--tokens", "rows.txt"], "rows.txt is not a .npy or .safetensors file: save the tokens as one of these."),
        (["--tokens", "rows.npy"], "rows.npy does not exist, or is not an ordinary file: give a file of tokens."),
    ],
)
def test_bad_options(tmp_path, options, message):
    result = CliRunner().invoke(app, ["import", str(RUN), "--out", str(tmp_path / "new"), *options])
    assert result.exit_code == 2 and message in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_leaves_nothing(folder, tmp_path):
    result = CliRunner().invoke(app, ["import", str(tmp_path / "nowhere"), "--out", str(tmp_path / "new")])
    assert result.exit_code == 2 and "is neither a folder or checkpoint nor the id" in result.output
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        import_run(RUN, folder)
    assert list(tmp_path.iterdir()) == []
