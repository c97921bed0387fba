"""How a decomposition lies on disk: a folder with ``decomposition.safetensors`` and ``config.json``.

Loading executes nothing. Keys of the tensor file are ``V/{site}``, ``U/{site}`` and ``gamma/{parameter}``. The config holds the
format version, sites and shapes, Γ's config, fingerprints of the target's weights, a checksum of the tensor file, and what
is known of the making (training config, metrics, versions).
"""

from __future__ import annotations

import hashlib
import json
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tl_vpd.fingerprint import Fingerprint
from tl_vpd.importance import GammaConfig
from tl_vpd.site import Site

if TYPE_CHECKING:
    from tl_vpd.decomposition import Decomposition

CONFIG, TENSORS = "config.json", "decomposition.safetensors"
FORMAT_VERSION = 1


def library_versions() -> dict[str, str]:
    """Installed versions of what a result depends on."""
    found = {}
    for package in ("tl-vpd", "torch", "transformer-lens", "transformers", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write_atomically(path: Path, write: Any) -> None:
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


def tensors_of(decomposition: Decomposition) -> dict[str, Tensor]:
    """All tensors of a decomposition under the keys of the file."""
    named: dict[str, Tensor] = {}
    for name in decomposition.sites:
        named[f"V/{name}"] = decomposition.V[name]
        named[f"U/{name}"] = decomposition.U[name]
    named.update({f"gamma/{k}": p for k, p in decomposition.gamma.named_parameters()})
    return {k: t.detach() for k, t in named.items()}


def save(decomposition: Decomposition, folder: Path, *, dtype: torch.dtype | None) -> Path:
    """See ``Decomposition.save``; raises OSError if the folder cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {k: t.to("cpu", dtype or t.dtype).contiguous() for k, t in tensors_of(decomposition).items()}
    record = {"versions": library_versions(), **decomposition.record}
    config = {
        "format_version": FORMAT_VERSION,
        "sites": [
            {"name": s.name, "d_in": s.d_in, "d_out": s.d_out, "n_heads": s.n_heads, "d_head": s.d_head}
            for s in decomposition.sites.values()
        ],
        "C": decomposition.counts,
        "gamma": decomposition.gamma_config.model_dump(),
        "fingerprints": {k: f.model_dump() for k, f in decomposition.fingerprints.items()},
        **record,
    }
    json.dumps(config)  # what cannot be written down is found out before anything is replaced
    write_atomically(folder / TENSORS, lambda p: save_file(named, p))
    write_json(folder / CONFIG, {**config, "sha256": _sha256(folder / TENSORS)})
    return folder


def load(folder: Path, *, device: torch.device, dtype: torch.dtype) -> Decomposition:
    """See ``Decomposition.load``."""
    from tl_vpd.decomposition import Decomposition

    for part in (CONFIG, TENSORS):
        if not (folder / part).is_file():
            what = "does not exist" if not folder.is_dir() else f"holds no {part}"
            raise FileNotFoundError(
                f"{folder} {what}, so it is no decomposition: give the folder that Decomposition.save wrote "
                f"({CONFIG} and {TENSORS})."
            )
    config = _read_config(folder / CONFIG)
    try:
        sites = [Site(**s) for s in config.pop("sites")]
        counts = config.pop("C")
        gamma = GammaConfig(**config.pop("gamma"))
        fingerprints = {k: Fingerprint(**f) for k, f in config.pop("fingerprints").items()}
        checksum = config.pop("sha256")
        missing = {s.name for s in sites} ^ set(counts) or {s.name for s in sites} ^ set(fingerprints)
        if missing:
            raise ValueError(f"sites, C and fingerprints disagree about {', '.join(sorted(missing))}")
        with torch.device("meta"):
            decomposition = Decomposition(sites, counts, gamma, fingerprints=fingerprints, record=config)
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        raise ValueError(f"{folder / CONFIG} is damaged: {error}") from error
    if _sha256(folder / TENSORS) != checksum:
        raise ValueError(
            f"{folder / TENSORS} is not the file that {CONFIG} was written for (its checksum differs): it was cut short or "
            "changed. Copy the folder again."
        )
    decomposition.to_empty(device=device).to(dtype)
    fill(decomposition, folder / TENSORS)
    return decomposition


@torch.no_grad()
def fill(decomposition: Decomposition, path: Path) -> None:
    """Reads every tensor from ``path`` into the decomposition; raises ValueError naming the key that is wrong."""
    wanted = tensors_of(decomposition)
    try:
        with safe_open(path, framework="pt", device=str(decomposition.device)) as file:
            keys = set(file.keys())
            if keys != set(wanted):
                lacking, extra = sorted(set(wanted) - keys), sorted(keys - set(wanted))
                raise ValueError(f"{path}: missing keys {lacking[:3]}, unexpected keys {extra[:3]}.")
            for key, target in wanted.items():
                stored = file.get_tensor(key)
                if stored.shape != target.shape:
                    raise ValueError(f"{path}: {key} is {tuple(stored.shape)}, the config says {tuple(target.shape)}.")
                if not bool(stored.isfinite().all()):
                    raise ValueError(f"{path}: {key} holds values that are not finite.")
                target.copy_(stored)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    found = config.pop("format_version", None) if isinstance(config, dict) else None
    if found != FORMAT_VERSION:
        hint = "update tl_vpd" if isinstance(found, int) and found > FORMAT_VERSION else "is it a decomposition's?"
        raise ValueError(f"{path}: format version {found!r}, this tl_vpd reads {FORMAT_VERSION}; {hint}")
    return config


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
