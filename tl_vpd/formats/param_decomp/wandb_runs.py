"""Runs on Weights & Biases, fetched once into a cache; a file is there as a whole or not at all.

The cache is ``$TL_VPD_CACHE``, or ``tl_vpd`` in the user's cache folder.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from tl_vpd.files.atomic import make_folder
from tl_vpd.formats.param_decomp.files import CHECKPOINT, CONFIGS, METRICS, MODEL_CONFIG, TOKENIZER

PROJECT = "goodfire/spd"
_FULL = re.compile(r"(?:wandb:)?(\w[\w.-]*/\w[\w.-]*)/(?:runs/)?(\w[\w-]*)")
_ID = re.compile(r"(?:wandb:)?([a-z]-[0-9a-f]{8})")


def wandb_path(run: str) -> str | None:
    """``entity/project/id`` of a run (None: the text does not name one); a bare id is of the authors' project."""
    short = _ID.fullmatch(run)
    if short:
        return f"{PROJECT}/{short[1]}"
    full = _FULL.fullmatch(run)
    return f"{full[1]}/{full[2]}" if full else None


def fetched_run(path: str) -> Path:
    """The local folder of a decomposition: config, metrics and newest checkpoint.

    Args:
        path: ``entity/project/id``.

    Raises:
        ImportError: ``wandb`` is not installed.
        OSError: the run cannot be fetched.
    """
    return _fetched(path, [*CONFIGS, METRICS], checkpoint=True)


def fetched_target(reference: str, *, with_checkpoint: bool) -> Path:
    """The local folder of a target.

    Args:
        reference: ``wandb:entity/project/runs/id``.
        with_checkpoint: whether its weights are needed.

    Raises:
        ImportError: ``wandb`` is not installed.
        OSError: the run cannot be fetched.
        ValueError: the reference does not name a run.
    """
    path = wandb_path(reference)
    if path is None:
        raise ValueError(f"{reference} does not name a Weights & Biases run: pass target=FOLDER.")
    return _fetched(path, [MODEL_CONFIG, TOKENIZER], checkpoint=with_checkpoint)


def cache_folder() -> Path:
    """Where fetched runs are."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "tl_vpd"
    return Path(os.environ.get("TL_VPD_CACHE") or default).expanduser()


def _fetched(path: str, names: Sequence[str], *, checkpoint: bool) -> Path:
    folder = cache_folder() / "runs" / path
    marker = folder / (".whole" if checkpoint else ".config")
    if marker.exists() or (folder / ".whole").exists():
        return folder
    for file in _wanted(_files(path), names, checkpoint=checkpoint):
        _download(file, folder, path)
    marker.touch()
    return folder


def _files(path: str) -> list[Any]:
    try:
        import wandb
    except ImportError as error:
        raise ImportError(
            f"{path} is on Weights & Biases: install what fetches it with pip install 'tl_vpd[runs]', or give a folder."
        ) from error
    try:
        return list(wandb.Api().run(path).files())
    except Exception as error:  # wandb's own classes: no such run, no key, no network
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise OSError(
            f"{path} cannot be fetched from Weights & Biases ({reason}): log in with wandb login, or give a folder."
        ) from error


def _wanted(files: Sequence[Any], names: Sequence[str], *, checkpoint: bool) -> list[Any]:
    def number(file: Any) -> int:
        match = CHECKPOINT.fullmatch(file.name.rsplit("/", 1)[-1])
        return int(match[1]) if match else -1

    numbered = [file for file in files if number(file) >= 0]
    newest = [max(numbered, key=number)] if checkpoint and numbered else []
    return [file for file in files if file.name in names] + newest


def _download(file: Any, folder: Path, path: str) -> None:
    """Fetches one file with a progress bar, and puts it into the folder when all its bytes are there."""
    make_folder(folder)
    place = folder / file.name.rsplit("/", 1)[-1]
    if place.exists():
        return
    with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as part:
        arriving = Path(part) / file.name
        with tqdm(total=file.size, unit="B", unit_scale=True, desc=f"{path}/{place.name}") as bar:
            _watched(lambda: file.download(root=part, replace=True), arriving, bar)
        size = arriving.stat().st_size if arriving.exists() else 0
        if size != file.size:
            raise OSError(f"{path}/{file.name} arrived with {size} of {file.size} bytes: fetch it again.")
        arriving.replace(place)


def _watched(fetch: Callable[[], Any], arriving: Path, bar: Any) -> None:
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(fetch)
        while not wait([future], timeout=0.5).done:
            bar.update(max(0, (arriving.stat().st_size if arriving.exists() else 0) - bar.n))
        opened = future.result()
        if hasattr(opened, "close"):
            opened.close()
    bar.update(max(0, (arriving.stat().st_size if arriving.exists() else 0) - bar.n))
