"""Runs on Weights & Biases: which files are fetched, once, whole or not at all.

The service is a folder: a module named ``wandb`` whose ``Api().run(path).files()`` has the names, sizes and ``download`` of the
real one (wandb 0.31) and copies files instead of fetching them.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tests.formats import authors
from tests.formats.test_param_decomp_variants import HERE, target_folder, tokens_of
from tl_vpd.formats import load_param_decomp
from tl_vpd.formats.param_decomp.wandb_runs import fetched_run, wandb_path

STATE = authors.random_state(2)


class Service:
    """Folders by ``entity/project/id``; counts what is downloaded, and may cut files short."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders, self.downloads, self.cut = folders, [], 0

    def run(self, path: str):
        if path not in self.folders:
            raise ValueError(f"Could not find run {path}\nmore lines")
        folder = self.folders[path]
        files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
        return SimpleNamespace(files=lambda: iter([self.file(p, folder) for p in files]))

    def file(self, path: Path, folder: Path):
        name = str(path.relative_to(folder))

        def download(root: str = ".", replace: bool = False, exist_ok: bool = False):
            place = Path(root) / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(path.read_bytes()[: path.stat().st_size - self.cut])
            self.downloads.append(name)
            return place.open()

        return SimpleNamespace(name=name, size=path.stat().st_size, download=download)


@pytest.fixture
def service(tmp_path, monkeypatch) -> Service:
    own = {k: v for k, v in STATE.items() if not k.startswith("target_model.")}
    run = authors.write_run(tmp_path / "remote", own, 2)
    (run / "model_config.yaml").unlink()
    shutil.copy(run / "model_7.pth", run / "model_3.pth")
    (run / "output.log").write_text("a log")
    (run / "metrics.jsonl").write_text(
        '{"step": 1, "eval/kl": 9.0}\n{"step": 7, "eval/kl": 0.5, "x": NaN}\n'.replace(', "x": NaN', "")
    )
    target = target_folder(tmp_path / "remote-target", STATE, 2)
    for file in (target / "checkpoints").iterdir():
        file.rename(target / file.name)
    service = Service({"goodfire/spd/s-00ff00ff": run, "goodfire/spd/t-0000abcd": target})
    module = ModuleType("wandb")
    module.Api = lambda: service  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv("TL_VPD_CACHE", str(tmp_path / "cache"))
    return service


def test_a_run_is_fetched_once_with_its_target(service, tmp_path):
    for _ in range(2):
        model, vpd = load_param_decomp("s-00ff00ff", HERE, tokens=tokens_of(), check_order=False)
    assert sorted(service.downloads) == [
        "final_config.yaml",
        "metrics.jsonl",
        "model_7.pth",
        "model_config.yaml",
        "model_step_99.pt",
    ]
    expected, _ = authors.forward(STATE, tokens_of(), 2)
    assert torch.allclose(model(tokens_of()).double(), expected, atol=2e-5)
    assert vpd.record["certificate"]["own_metrics"] == {"step": 7, "eval/kl": 0.5}
    monkeypatch = sys.modules.pop("wandb")
    again, _ = load_param_decomp("wandb:goodfire/spd/runs/s-00ff00ff", HERE, tokens=tokens_of(), check_order=False)
    sys.modules["wandb"] = monkeypatch
    assert torch.equal(again(tokens_of()), model(tokens_of())) and len(service.downloads) == 5
    names = {p.name for p in (tmp_path / "cache" / "runs" / "goodfire" / "spd" / "s-00ff00ff").iterdir()}
    assert names == {"final_config.yaml", "metrics.jsonl", "model_7.pth", ".whole"}


def test_a_target_whose_config_was_enough_before_is_fetched_whole_when_it_is_needed(service, tmp_path):
    service.folders["goodfire/spd/s-0000000a"] = authors.write_run(tmp_path / "whole", STATE, 2)
    (tmp_path / "whole" / "model_config.yaml").unlink()
    load_param_decomp("s-0000000a", HERE, tokens=tokens_of(), check_order=False)
    assert "model_step_99.pt" not in service.downloads and "model_config.yaml" in service.downloads
    load_param_decomp("s-00ff00ff", HERE, tokens=tokens_of(), check_order=False)
    assert service.downloads.count("model_step_99.pt") == 1 and service.downloads.count("model_config.yaml") == 1


def test_a_file_cut_short_is_fetched_again(service, tmp_path):
    service.cut = 1
    with pytest.raises(OSError, match=r"s-00ff00ff/final_config\.yaml arrived with \d+ of \d+ bytes: fetch it again\."):
        fetched_run("goodfire/spd/s-00ff00ff")
    folder = tmp_path / "cache" / "runs" / "goodfire" / "spd" / "s-00ff00ff"
    assert list(folder.iterdir()) == []
    service.cut = 0
    assert (fetched_run("goodfire/spd/s-00ff00ff") / "model_7.pth").exists()


def test_a_run_that_does_not_exist_and_a_missing_library(service, monkeypatch):
    with pytest.raises(
        OSError, match=r"^goodfire/spd/s-11111111 cannot be fetched from .* \(Could not find run [^\n]*\): log in"
    ):
        load_param_decomp("s-11111111", HERE)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"pip install 'tl_vpd\[runs\]', or give a folder\."):
        load_param_decomp("s-11111111", HERE)


def test_what_names_a_run():
    assert wandb_path("s-55ea3f9b") == wandb_path("wandb:goodfire/spd/runs/s-55ea3f9b") == "goodfire/spd/s-55ea3f9b"
    assert wandb_path("me/mine/jyo9duz5") == wandb_path("wandb:me/mine/runs/jyo9duz5") == "me/mine/jyo9duz5"
    for text in ("runs/s-55ea3f9b", "model.pth", "", "a/b", "/a/b/c", "../s-55ea3f9b", "../../runs/x"):
        assert wandb_path(text) is None
