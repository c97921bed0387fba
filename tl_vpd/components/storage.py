"""A decomposition on disk: a folder with ``decomposition.safetensors`` and ``config.json``.

Loading executes nothing. This module knows the two files and their checksum; ``tl_vpd.importance.decomposed`` knows what the
config and the tensors mean.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

CONFIG, TENSORS = "config.json", "decomposition.safetensors"
FORMAT_VERSION = 1


def library_versions() -> dict[str, str]:
    """Installed versions of what a result depends on."""
    installed = {}
    for package in ("tl-vpd", "torch", "transformer-lens", "transformers", "numpy"):
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls ``write(temporary_path)`` and moves the result into place, so that a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON atomically."""
    write_atomically(path, lambda p: p.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8"))


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Writes both files; the config gets the format version and the tensors' checksum.

    Raises:
        OSError: the folder cannot be written.
        TypeError: the config is not JSON; nothing has been written then.
        ValueError: the same.
    """
    json.dumps(config)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / TENSORS, lambda p: save_file(dict(tensors), p))
    write_json(folder / CONFIG, {"format_version": FORMAT_VERSION, **config, "sha256": sha256_of(folder / TENSORS)})
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a folder, its ``sha256`` included.

    Raises:
        FileNotFoundError: there is no such folder, or it does not hold both files.
        ValueError: the config is not JSON, or of another format.
    """
    for name in (CONFIG, TENSORS):
        if not (folder / name).is_file():
            reason = "does not exist" if not folder.is_dir() else f"has no {name}"
            raise FileNotFoundError(
                f"{folder} {reason}, so it is not a decomposition: give the folder that Decomposition.save wrote "
                f"({CONFIG} and {TENSORS})."
            )
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    stored = config.pop("format_version", None) if isinstance(config, dict) else None
    if stored != FORMAT_VERSION:
        hint = (
            "update tl_vpd"
            if isinstance(stored, int) and stored > FORMAT_VERSION
            else "is it the config of a decomposition?"
        )
        raise ValueError(f"{path}: format version {stored!r}, this tl_vpd reads {FORMAT_VERSION}; {hint}")
    return config


def check_tensors(folder: Path, checksum: str) -> None:
    """Raises ValueError unless the tensor file is the one that the config was written for."""
    if sha256_of(folder / TENSORS) != checksum:
        raise ValueError(
            f"{folder / TENSORS} is not the file that {CONFIG} was written for (its checksum differs): it was cut short or "
            "changed. Copy the folder again."
        )


@torch.no_grad()
def fill(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Reads every tensor of a file into the tensor of the same key, in place, on that tensor's device and in its dtype.

    Raises:
        ValueError: the file is damaged, or a key, shape or value is wrong; the message names it.
    """
    device = next(iter(tensors.values())).device
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            keys = set(file.keys())
            if keys != set(tensors):
                missing, extra = sorted(set(tensors) - keys), sorted(keys - set(tensors))
                raise ValueError(f"{path}: missing keys {missing[:3]}, unexpected keys {extra[:3]}.")
            for key, target in tensors.items():
                stored = file.get_tensor(key)
                if stored.shape != target.shape:
                    raise ValueError(f"{path}: {key} is {tuple(stored.shape)}, the config says {tuple(target.shape)}.")
                if not bool(stored.isfinite().all()):
                    raise ValueError(f"{path}: {key} holds values that are not finite.")
                target.copy_(stored)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
