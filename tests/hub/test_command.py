"""``tl-vpd card`` and ``tl-vpd push``."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from tl_vpd.cli import app


def command(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def folder(vpd, report, tmp_path):
    """A decomposition in bfloat16 with its report beside it."""
    vpd.save(tmp_path / "d", dtype=torch.bfloat16)
    report.save(tmp_path / "d" / "metrics.json")
    return tmp_path / "d"


def test_a_card_is_printed_or_written(folder, tmp_path):
    printed = command("card", folder, "--licence", "mit", "--dataset", "a/b", "--dataset", "c")
    assert (
        printed.exit_code == 0 and "## What may be claimed" in printed.stdout and "Not evaluated" not in printed.stdout
    )
    out = tmp_path / "README.md"
    written = command("card", folder, "--repository", "user/repo", "--out", out, "--base-model", "org/model")
    assert written.exit_code == 0 and written.stdout == f"Written: {out}\n"
    card = ModelCard.load(out)
    assert card.data.base_model == "org/model" and "from_hub('user/repo')" in card.text
    assert ModelCard(printed.stdout).data.datasets == ["a/b", "c"]


def test_a_push_from_another_process_uploads_the_folder_as_it_is(hub, folder, tmp_path):
    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_owner", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    result = subprocess.run(
        [sys.executable, "-m", "tl_vpd.cli", "push", str(folder), "user/repo", "--private", "--licence", "mit"],
        env={**os.environ, **environment, "HF_HUB_DISABLE_XET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    commit = hub.repositories["user/repo"].branches["main"]
    assert result.stdout == f"Pushed: {hub.url}/user/repo/commit/{commit}\n"
    files = hub.files("user/repo")
    assert hub.repositories["user/repo"].private
    for name in ("decomposition.safetensors", "config.json", "metrics.json"):
        assert files[name] == (folder / name).read_bytes(), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["card", "nowhere"], "nowhere does not exist"),
        (["card", "{}", "--report", "nowhere.json"], "nowhere.json does not exist"),
        (["card", "{}", "--licence", "my own"], "licence='my own'"),
        (["push", "{}", "repo"], "'repo' is not the name of a repository"),
        (["push", "{}", "user/repo"], "there is no token"),
    ],
)
def test_mistakes_are_one_line(hub, folder, arguments, message):
    result = command(*(str(folder) if a == "{}" else a for a in arguments))
    assert result.exit_code == 2 and message in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert not hub.calls
