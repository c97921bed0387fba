"""An edit on disk: one safetensors file that proves what it holds (``tl_vpd.files.tensor_file``).

Keys of the tensors are ``read/{site}`` ``[d_in, k]``, ``write/{site}`` and ``change/{site}`` ``[k, d_out]``; the content says
what the k pieces of each site are, in the order of the edit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from tl_vpd.checks import sentence_of
from tl_vpd.components import Fingerprint
from tl_vpd.editing.piece import Piece
from tl_vpd.files.tensor_file import TensorFile, open_tensors, write_tensors
from tl_vpd.frozen import Frozen


class StoredPiece(Frozen):
    """A piece without its tensors; fields as ``Piece`` has them."""

    site: str = Field(min_length=1)
    index: int | None = Field(ge=0)
    about: str


class StoredEdit(Frozen):
    """The content of the file."""

    kind: Literal["edit"]
    version: Literal[1]
    pieces: tuple[StoredPiece, ...] = Field(min_length=1)
    fingerprints: dict[str, Fingerprint]
    processing: dict[str, bool]


def write_edit(
    path: Path, pieces: Sequence[Piece], fingerprints: Mapping[str, Fingerprint], processing: Mapping[str, bool]
) -> Path:
    """Writes an edit; errors as for ``write_tensors``.

    Args:
        path: of the file.
        pieces: in order.
        fingerprints: by site.
        processing: of the model's weights.
    """
    tensors: dict[str, Tensor] = {}
    for site in dict.fromkeys(piece.site for piece in pieces):
        of_site = [piece for piece in pieces if piece.site == site]
        tensors[f"read/{site}"] = torch.stack([p.read for p in of_site], dim=1)
        tensors[f"write/{site}"] = torch.stack([p.write for p in of_site])
        tensors[f"change/{site}"] = torch.stack([p.change for p in of_site])
    content: dict[str, Any] = {
        "kind": "edit",
        "version": 1,
        "pieces": [{"site": p.site, "index": p.index, "about": p.about} for p in pieces],
        "fingerprints": {site: f.model_dump() for site, f in fingerprints.items()},
        "processing": dict(processing),
    }
    write_tensors(path, tensors, content)
    return path


def read_edit(path: Path) -> tuple[tuple[Piece, ...], dict[str, Fingerprint], dict[str, bool]]:
    """Reads an edit: its pieces, fingerprints and processing.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an edit, or damaged.
    """
    with open_tensors(path) as file:
        if not isinstance(file.content, dict) or file.content.get("kind") != "edit":
            raise ValueError(f"{path} is not an edit: give a file that Edit.save wrote.")
        try:
            stored = StoredEdit.model_validate(file.content)
        except ValidationError as error:
            raise ValueError(f"{path} is damaged: {sentence_of(error)}") from error
        counts = Counter(piece.site for piece in stored.pieces)
        _check_shapes(file, stored, counts)
        tensors = {key: file.read(key) for key in file.shapes}
    read_so_far: Counter[str] = Counter()
    pieces = []
    for p in stored.pieces:
        k = read_so_far[p.site]
        read_so_far[p.site] += 1
        read, write, change = (tensors[f"{what}/{p.site}"] for what in ("read", "write", "change"))
        pieces.append(Piece(p.site, p.index, p.about, read[:, k], write[k], change[k]))
    return tuple(pieces), stored.fingerprints, stored.processing


def _check_shapes(file: TensorFile, stored: StoredEdit, counts: Mapping[str, int]) -> None:
    """Raises ValueError unless the file has the tensors that its content speaks of."""
    expected = {f"{what}/{site}" for site in counts for what in ("read", "write", "change")}
    if set(file.shapes) != expected or not set(counts) <= set(stored.fingerprints):
        raise ValueError(f"{file.path} is damaged: its tensors or fingerprints are not those of its pieces.")
    for site, k in counts.items():
        read, write, change = (file.shapes[f"{what}/{site}"] for what in ("read", "write", "change"))
        if len(read) != 2 or read[1] != k or len(change) != 2 or change[0] != k or write != change:
            raise ValueError(f"{file.path} is damaged: the tensors of {site} are not those of {k} pieces.")
