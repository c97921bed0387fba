"""What every installation must be able to do, run with the lowest versions that pyproject.toml allows (``make test-others``)."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import tl_vpd
from tests.marks import needs_hooked_transformer
from tests.tiny import GAMMA, decomposition_of, some_tokens, tiny_model
from tl_vpd import bundled, viz

ROOT = Path(__file__).parents[2]
CLI = (Path(sys.executable).parent / "tl-vpd").as_posix()


def pins(name: str) -> dict[str, str]:
    """The versions of a file of constraints."""
    lines = (ROOT / "constraints" / name).read_text(encoding="utf-8").splitlines()
    return dict(line.replace("_", "-").split("==") for line in lines if line and not line.startswith("#"))


def test_the_constraints_are_the_lowest_versions_allowed():
    pinned = pins("lowest.txt")
    for text in requires("tl_vpd") or []:
        requirement = Requirement(text)
        name = requirement.name.replace("_", "-")
        if requirement.marker or name == "torch":
            continue
        lowest = [s.version for s in requirement.specifier if s.operator == ">="]
        assert len(lowest) == 1, f"{name} has no lower bound"
        padded = lowest[0].split(".") + ["0"] * 3
        assert name in pinned, name
        # The first release of a series may not exist, or be withdrawn: then the lowest one of the series.
        assert pinned[name].split(".")[: len(lowest[0].split("."))] == padded[: len(lowest[0].split("."))], name


@pytest.mark.skipif(
    version("transformer_lens") != pins("lowest.txt")["transformer-lens"],
    reason="only the environment of the lowest versions (make test-others) has them",
)
def test_this_environment_has_the_lowest_versions():
    for name, pinned in pins("lowest.txt").items():
        assert version(name).split("+")[0] == pinned, name


@pytest.mark.parametrize(
    "command", [[], *([c] for c in ("demo", "train", "eval", "plan"))], ids=lambda c: " ".join(c) or "all"
)
def test_help(command):
    result = subprocess.run([CLI, *command, "--help"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Usage" in result.stdout


@needs_hooked_transformer
def test_the_bundled_decomposition_attaches_and_masks():
    model, vpd = bundled.model(), bundled.decomposition()
    tokens = bundled.tokens("validation")[:1, :16]
    with torch.no_grad():
        clean = model(tokens)
        with vpd.attach(model) as attached:
            assert torch.equal(model(tokens), clean)
            with attached.masked("rounded"):
                masked = model(tokens)
    assert not torch.equal(masked, clean) and bool(masked.isfinite().all())


@needs_hooked_transformer
def test_train_save_load_and_draw(tmp_path):
    model, tokens = tiny_model(torch.float32), some_tokens()
    config = tl_vpd.VPDConfig(steps=2, batch_size=2, C=4, gamma=GAMMA, faithfulness={"warm_up_steps": 1})
    run = tl_vpd.decompose(model, tokens, config, saving=tl_vpd.SavingConfig(folder=tmp_path / "run"), progress=False)
    run.decomposition.save(tmp_path / "vpd")
    loaded = tl_vpd.Decomposition.load(tmp_path / "vpd")
    assert all(torch.equal(loaded.V[name], V) for name, V in run.decomposition.V.items())
    harvest = tl_vpd.harvest(decomposition_of(model), model, tokens)
    graph = tl_vpd.attribution_graph(loaded, model, tokens[:1], 3)
    assert len(harvest.top(3)) == 3 and graph.to_networkx().number_of_nodes() == len(graph)
    page = viz.graph(graph).save(tmp_path / "graph.html")
    assert "tlVpdGraph(" in page.read_text(encoding="utf-8")
