"""Folders of the first format: ``config.json`` has the config and the SHA-256 of ``decomposition.safetensors``.

They load as ever, but nothing proves the config; a decomposition that is saved again is of the present format.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any
from warnings import warn

from tl_vpd.files.json_files import read_json

SECTIONS = ("sites", "C", "gamma", "fingerprints")


def read_config(path: Path, tensors: Path) -> dict[str, Any]:
    """The config in the form of today, after the tensor file was compared with its checksum; raises FileNotFoundError without a
    config, ValueError where it is not of this format, or the tensors are not those it was written for.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.parent} has no {path.name}, so it is not a decomposition: give the folder that Decomposition.save wrote."
        )
    stored = read_json(path)
    config = dict(stored) if isinstance(stored, dict) else {}
    version, checksum = config.pop("format_version", None), config.pop("sha256", None)
    if version != 1:
        raise ValueError(
            f"{path}: format version {version!r}, and {tensors.name} has no config: give a folder that Decomposition.save wrote."
        )
    if sha256_of(tensors) != checksum:
        raise ValueError(
            f"{tensors} is not the file that {path.name} was written for (its checksum differs): it was cut short or changed, "
            "copy the folder again."
        )
    warn(
        f"{path.parent} is of an older format, in which nothing proves {path.name}: load and save it once.",
        stacklevel=2,
    )
    known = {section: config.pop(section) for section in SECTIONS if section in config}
    return {**known, "record": config}


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
