"""The files of a run: one folder with a config and numbered checkpoints, read as data and never followed out of the folder."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

CONFIGS = ("experiment_config.yaml", "final_config.yaml")
METRICS, MODEL_CONFIG, TOKENIZER = "metrics.jsonl", "model_config.yaml", "tokenizer.json"
CHECKPOINT = re.compile(r"model(?:_step)?_(\d+)\.(?:pth|pt)")


def inside(path: Path, folder: Path) -> Path:
    """The path, if it leads to an ordinary file in the folder.

    Raises:
        ValueError: it is a link that leads out of the folder.
        FileNotFoundError: there is no ordinary file of this name.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} {'is not an ordinary file' if path.exists() else 'does not exist'}.")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"{path} is a link to {path.resolve()}, out of the run's folder: copy the file into the folder."
        )
    return path


def first_of(folder: Path, names: Sequence[str]) -> Path | None:
    """The first of the files that the folder has (None: it has none)."""
    for name in names:
        if (folder / name).exists() or (folder / name).is_symlink():
            return inside(folder / name, folder)
    return None


def step_of(path: Path) -> int | None:
    """The number in a checkpoint's name (None: there is none)."""
    match = CHECKPOINT.fullmatch(path.name)
    return int(match[1]) if match else None


def checkpoint_in(folder: Path, *, where: Sequence[str] = (".",)) -> Path:
    """A folder's checkpoint; of several, the newest by number, which a warning names.

    Args:
        folder: of the run.
        where: subfolders that may have it.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there are several without numbers, or it is a link out of the folder.
    """
    found = sorted(p for place in where for p in (folder / place).glob("*") if p.suffix in (".pth", ".pt"))
    numbered = sorted((p for p in found if step_of(p) is not None), key=lambda p: (step_of(p) or 0, p.name))
    if not found:
        raise FileNotFoundError(
            f"{folder} has no checkpoint: it needs model_<step>.pth (of a decomposition) or model_step_<step>.pt (of a target)."
        )
    if not numbered and len(found) > 1:
        names = ", ".join(p.name for p in found)
        raise ValueError(f"{folder} has several checkpoints without a number ({names}): give the path of one.")
    newest = (numbered or found)[-1]
    if len(numbered) > 1:
        others = ", ".join(p.name for p in numbered[:-1])
        warnings.warn(f"{folder} has {len(numbered)} checkpoints: {newest.name} is read, not {others}.", stacklevel=2)
    return inside(newest, folder)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file of named values.

    Raises:
        ValueError: it is not YAML, or not named values; one sentence.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"{path} is not YAML that can be read as data ({reason}).") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{path} holds {type(content).__name__} where names with values are needed.")
    return content
