"""A decomposition on disk: a folder with ``decomposition.safetensors`` and ``config.json``.

The tensor file has everything: the tensors, the config, and the digests of both (``tl_vpd.files.tensor_file``). So a changed
byte is noticed, and replacing the file leaves the old decomposition or the new one. ``config.json`` is a copy of the config for
people; nothing is read from it, except in folders of format 1 (``tl_vpd.components.format_1``).

This module knows the two files; ``tl_vpd.importance.stored_config`` knows what the config means.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from warnings import warn

import torch
from torch import Tensor

from tl_vpd.checks import check_finite, shown
from tl_vpd.components.format_1 import read_config
from tl_vpd.files.atomic import make_folder, write_file
from tl_vpd.files.json_files import json_text, parse_json, read_json
from tl_vpd.files.tensor_file import TensorFile, open_tensors, write_tensors

CONFIG, TENSORS = "config.json", "decomposition.safetensors"
FORMAT_VERSION = 2
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""The types that a decomposition can have."""


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Writes both files into a folder, which is made if needed; a decomposition that is there is replaced. Raises FileExistsError
    where ``config.json`` belongs to something else, OSError, which says what is safe, TypeError or ValueError where the config is
    not data, before anything is written.
    """
    content = parse_json(json_text({"format_version": FORMAT_VERSION, **config}), "The config")
    make_folder(folder)
    _check_replaceable(folder)
    write_tensors(folder / TENSORS, tensors, content)
    copied: Any = None
    while copied != content:  # another process may have replaced the tensors since
        copied, text = content, json_text(content, indent=1) + "\n"
        write_file(
            folder / CONFIG,
            lambda p, text=text: p.write_text(text, encoding="utf-8"),  # type: ignore[misc]
            safe=f"{TENSORS} is whole, and a decomposition can be loaded without {CONFIG}",
        )
        with open_tensors(folder / TENSORS) as file:
            content = file.content
    return folder


@contextmanager
def open_folder(folder: Path) -> Iterator[tuple[dict[str, Any], TensorFile]]:
    """The config of a folder, without its version, and the open tensor file; raises FileNotFoundError where it is not a
    decomposition, ValueError where a file is damaged or of another format.
    """
    if not (folder / TENSORS).is_file():
        reason = f"has no {TENSORS}" if folder.is_dir() else "is a file" if folder.exists() else "does not exist"
        raise FileNotFoundError(
            f"{folder} {reason}, so it is not a decomposition: give the folder that Decomposition.save wrote."
        )
    with open_tensors(folder / TENSORS) as file:
        if file.content is None:
            yield read_config(folder / CONFIG, file.path), file
            return
        config = dict(file.content) if isinstance(file.content, dict) else {}
        version = config.pop("format_version", None)
        if version != FORMAT_VERSION:
            newer = isinstance(version, int) and version > FORMAT_VERSION
            hint = "update tl_vpd" if newer else "give a folder that Decomposition.save wrote"
            raise ValueError(
                f"{file.path}: format version {version!r}, this tl_vpd reads 1 and {FORMAT_VERSION}; {hint}."
            )
        _compare_copy(folder / CONFIG, file.content)
        yield config, file


def check_tensors(tensors: Mapping[str, Tensor], file: TensorFile) -> None:
    """Raises ValueError, with its name, where a key, shape or type in the file's header is not that of the tensors."""
    if file.shapes.keys() != tensors.keys():
        missing, extra = sorted(tensors.keys() - file.shapes.keys()), sorted(file.shapes.keys() - tensors.keys())
        raise ValueError(f"{file.path}: missing keys {missing[:3]}, unexpected keys {extra[:3]}.")
    for key, tensor in tensors.items():
        if file.shapes[key] != tensor.shape:
            raise ValueError(f"{file.path}: {key} is {file.shapes[key]}, the config says {tuple(tensor.shape)}.")
        if file.dtypes[key] not in FLOATS:
            raise ValueError(
                f"{file.path}: {key} is of {file.dtypes[key]}, a type of floating-point numbers is needed."
            )


@torch.no_grad()
def fill(tensors: Mapping[str, Tensor], file: TensorFile) -> None:
    """Reads every tensor into the one of the same key, in place, on its device and in its dtype, one after the other; raises
    ValueError, with its name, where one is damaged or has values that are not finite in the dtype.
    """
    for key, tensor in tensors.items():
        stored = file.read(key)
        tensor.copy_(stored)
        check_values(f"{file.path}: {key}", stored, tensor)
        del stored  # before the next one is read


def check_values(name: str, exact: Tensor, converted: Tensor) -> None:
    """Raises ValueError if a tensor has values that are NaN or infinite, before or after a change of its dtype."""
    extremes = torch.stack(
        torch.aminmax(converted)
    )  # NaN if there is one; isfinite() would need several times the memory
    if not bool(extremes.isfinite().all()):
        check_finite(name, exact)
        raise ValueError(
            f"{name} has values up to {float(exact.abs().max()):.4g}, too large for {converted.dtype}: choose another dtype."
        )


def float_dtype(dtype: Any) -> torch.dtype:
    """A dtype that a decomposition can have; raises TypeError or ValueError for anything else."""
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype={shown(dtype)} is a {type(dtype).__name__}: give a dtype, such as torch.float32.")
    if dtype not in FLOATS:
        raise ValueError(f"dtype={dtype}: choose from {', '.join(map(str, FLOATS))}.")
    return dtype


def _check_replaceable(folder: Path) -> None:
    """Raises FileExistsError if the folder's config.json is not that of a decomposition."""
    path = folder / CONFIG
    if not path.exists():
        return
    with suppress(ValueError, OSError):
        content = read_json(path)
        if isinstance(content, dict) and {"format_version", "sites", "fingerprints"} <= content.keys():
            return
        raise FileExistsError(f"{path} belongs to something else than a decomposition: choose another folder.")
    if not (folder / TENSORS).is_file():
        raise FileExistsError(f"{path} is not the config of a decomposition: choose another folder.")


def _compare_copy(path: Path, content: Any) -> None:
    """Warns if config.json is not the copy of the content that it should be."""
    try:
        problem = "" if read_json(path) == content else f"{path} differs from the config in {TENSORS}"
    except (OSError, ValueError) as error:
        problem = str(error).rstrip(".")
    if problem:
        warn(
            f"{problem}: only {TENSORS} is read, which is intact (an edit of {CONFIG} has no effect, and a save that was "
            "interrupted leaves it behind; save again to renew it).",
            stacklevel=2,
        )
