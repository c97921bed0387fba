"""One safetensors file with tensors and a JSON content that prove each other.

The header's metadata holds the content, the SHA-256 of every tensor (of its key, dtype, shape and bytes), and the SHA-256 of
both. A changed byte anywhere is noticed: in the content at once, in a tensor when it is read. Since all is in one file, replacing
it leaves the old or the new.

>>> write_tensors(path, {"V": torch.ones(2, 3)}, {"sites": ["blocks.0.attn.W_Q"]})     # doctest: +SKIP
>>> with open_tensors(path) as file:                                                   # doctest: +SKIP
...     file.content["sites"], file.shapes["V"], file.read("V")
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tl_vpd.files.atomic import write_file
from tl_vpd.files.json_files import json_text, parse_json

CONTENT, DIGEST = "tl_vpd", "tl_vpd_sha256"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}
"""PyTorch's types by their names in the header."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorFile:
    """An open file.

    Attributes:
        path: of the file.
        content: the JSON content (None: the file was not written by ``write_tensors``).
        shapes: by key, from the header: nothing is allocated for them.
        dtypes: by key, from the header; other types have their names.
        metadata: the header's strings.
        digests: SHA-256 by key (empty where ``content`` is None).
    """

    path: Path
    content: Any
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype | str]
    metadata: dict[str, str]
    digests: dict[str, str] = field(repr=False)
    _file: BufferedReader = field(repr=False)
    _starts: dict[str, int] = field(repr=False)

    def read(self, key: str) -> Tensor:
        """A tensor, on the CPU, proved by its digest where the file has one; raises ValueError where its bytes have changed."""
        tensor = self._read(key, 0, self.shapes[key])
        if self.digests and digest_of(key, tensor) != self.digests[key]:
            raise ValueError(f"{self.path}: {key} is damaged, its checksum differs from the one it was written with.")
        return tensor

    def read_part(self, key: str, start: int, stop: int) -> Tensor:
        """Entries ``start`` to ``stop`` of a tensor's first axis, on the CPU; a part cannot be proved by a digest."""
        n, *rest = self.shapes[key]
        if not 0 <= start <= stop <= n:
            raise ValueError(f"{self.path}: {key} has {n} entries, and {start} to {stop} are wanted.")
        return self._read(key, start, (stop - start, *rest))

    def _read(self, key: str, start: int, shape: tuple[int, ...]) -> Tensor:
        dtype = self.dtypes[key]
        if isinstance(dtype, str):
            raise ValueError(f"{self.path}: {key} is of type {dtype}, which is not read.")
        tensor = torch.empty(shape, dtype=dtype)
        self._file.seek(self._starts[key] + start * dtype.itemsize * math.prod(shape[1:]))
        if self._file.readinto(_bytes(tensor)) != tensor.nbytes:
            raise ValueError(f"{self.path}: {key} is cut short: the file changed while it was read.")
        return tensor


def write_tensors(path: Path, tensors: Mapping[str, Tensor], content: Any, *, safe: str | None = None) -> None:
    """Writes tensors and a content that JSON can hold; errors of writing as for ``write_file``. Raises TypeError for types that
    are not stored (complex, 8-bit floats), ValueError for NaN and infinite numbers.
    """
    ready = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
    for key, t in ready.items():
        if t.dtype not in NAMES:
            raise TypeError(f"{key} is of {t.dtype}: store it as one of {', '.join(map(str, NAMES))}.")
        if t.is_floating_point() and not bool(t.isfinite().all()):
            raise ValueError(f"{key} holds values that are NaN or infinite in {t.dtype}: {path.name} was not written.")
    stored = json_text({"content": content, "tensors": {key: digest_of(key, t) for key, t in ready.items()}})
    metadata = {CONTENT: stored, DIGEST: hashlib.sha256(stored.encode()).hexdigest()}
    write_file(path, lambda p: _write(p, ready, metadata), safe=safe)


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Opens a file and checks its content; tensors are read, and checked, one at a time. Raises FileNotFoundError or, for a
    damaged header, ValueError.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} {'is not an ordinary file' if path.exists() else 'does not exist'}.")
    # Read, not mapped: a file that is cut meanwhile would end the process, and pages of a mapping count as its memory.
    with path.open("rb") as file:
        try:
            with safe_open(path, framework="pt"):
                pass  # lengths, offsets, types and shapes fit together
        except (SafetensorError, OSError) as error:
            reason = " ".join(str(error).split())[:200]  # it may quote all of the header
            raise ValueError(f"{path} is not an intact safetensors file: {reason}.") from error
        length = int.from_bytes(file.read(8), "little")
        entries = parse_json(file.read(length), f"The header of {path}")
        metadata = entries.pop("__metadata__", None) or {}
        content, digests = _proved(path, metadata)
        if content is not None and set(entries) != set(digests):
            raise ValueError(f"{path} is damaged: its tensors are not those of its header's content.")
        shapes = {key: tuple(entry["shape"]) for key, entry in entries.items()}
        dtypes = {key: DTYPES.get(entry["dtype"], entry["dtype"]) for key, entry in entries.items()}
        starts = {key: 8 + length + entry["data_offsets"][0] for key, entry in entries.items()}
        yield TensorFile(path, content, shapes, dtypes, metadata, digests, file, starts)


def digest_of(key: str, tensor: Tensor) -> str:
    """The SHA-256 of a CPU tensor's key, dtype, shape and bytes, as hexadecimal digits."""
    digest = hashlib.sha256(f"{key} {tensor.dtype} {list(tensor.shape)} ".encode())
    digest.update(_bytes(tensor))
    return digest.hexdigest()


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file. The library's own function leaves a temporary file of any name where its process is killed, and makes
    files that only their owner can read."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    keys = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))  # wide types first: all are aligned
    start = 0
    for key in keys:
        t = tensors[key]
        header[key] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [start, start + t.nbytes]}
        start += t.nbytes
    text = json_text(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in keys:
            file.write(_bytes(tensors[key]))


def _bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _proved(path: Path, metadata: Mapping[str, str]) -> tuple[Any, dict[str, str]]:
    """The content and the tensors' digests; (None, {}) for a file of another program."""
    if not {CONTENT, DIGEST} & set(metadata):
        return None, {}
    stored = metadata.get(CONTENT, "")
    if hashlib.sha256(stored.encode()).hexdigest() != metadata.get(DIGEST):
        raise ValueError(f"{path} is damaged: the content in its header is not the one that was written.")
    parsed = parse_json(stored, f"The content of {path}")
    return parsed["content"], parsed["tensors"]
