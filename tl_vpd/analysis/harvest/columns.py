"""Importances and activations on the disk, by subcomponent: a folder's files, each of one stretch of rows.

    folder/columns-00000.safetensors      starts [C + 1], tokens [entry], importances [entry], activations [entry]

An entry is a (token, subcomponent) pair of importance above 0; within a file entries are sorted by subcomponent, then by token. A
column is read from every file in turn, so that memory is that of one column.

    >>> column = harvested.columns.read(harvested.index("blocks.1.mlp.W_in:12"))           # doctest: +SKIP
    >>> column.rows, column.positions, column.importances            # doctest: +SKIP
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_vpd.analysis.harvest.batch import Active
from tl_vpd.files.tensor_file import open_tensors, write_tensors
from tl_vpd.printing import Printed

KEYS = {"starts", "tokens", "importances", "activations"}


@dataclass(frozen=True)
class Column(Printed):
    """Where one subcomponent is important at all, in the order of the data; on the CPU.

    Attributes:
        rows: of the data.
        positions: in the row.
        importances: there, in half precision.
        activations: there, ``(x @ V[:, c]) ‖U[c]‖``.
    """

    rows: Int[Tensor, " entry"]
    positions: Int[Tensor, " entry"]
    importances: Float[Tensor, " entry"]
    activations: Float[Tensor, " entry"]

    def to_pandas(self) -> pd.DataFrame:
        """One row per token: row, pos, importance, activation."""
        names = {
            "row": self.rows,
            "pos": self.positions,
            "importance": self.importances,
            "activation": self.activations,
        }
        return pd.DataFrame({name: values.tolist() for name, values in names.items()})


@dataclass(frozen=True)
class Columns:
    """The columns of a harvest.

    Attributes:
        files: in which they are, in the order of the rows.
        context: tokens in a row.
    """

    files: tuple[Path, ...]
    context: int

    def read(self, i: int) -> Column:
        """The column of the i-th harvested subcomponent.

        Raises:
            FileNotFoundError: a file is not there any more.
            ValueError: a file is damaged.
        """
        entries: dict[str, list[Tensor]] = {"tokens": [], "importances": [], "activations": []}
        for path in self.files:
            with open_tensors(path) as file:
                low, high = file.read_part("starts", i, i + 2).tolist()
                for name, values in entries.items():
                    part = file.read_part(name, low, high)
                    values.append(part.long() + file.content["first_token"] if name == "tokens" else part)
        tokens, g, a = (torch.cat(values) for values in entries.values())
        return Column(tokens // self.context, tokens % self.context, g, a)

    def check(self) -> None:
        """Compares every byte with its checksum.

        Raises:
            FileNotFoundError: a file is not there.
            ValueError: a file is damaged, or holds something else.
        """
        for path in self.files:
            with open_tensors(path) as file:
                if set(file.shapes) != KEYS or "first_token" not in (file.content or {}):
                    raise ValueError(f"{path} does not hold columns of a harvest: give the folder of one.")
                for key in KEYS:
                    file.read(key)

    @property
    def bytes(self) -> int:
        """Size of the files."""
        return sum(path.stat().st_size for path in self.files)


class Entries:
    """The entries of a stretch of rows, collected batch by batch.

    Args:
        C: number of subcomponents.
        context: tokens in a row.
    """

    def __init__(self, C: int, context: int) -> None:
        self.C, self.context, self.bytes = C, context, 0
        self._batches: list[tuple[np.ndarray, ...]] = []

    def __len__(self) -> int:
        return len(self._batches)

    def add(self, active: Active, first_row: int) -> None:
        """Adds a batch of rows; what is NaN counts as important."""
        values = active.token + first_row * self.context, active.c.to(torch.int32), active.g.half(), active.a.float()
        self._batches.append(tuple(v.cpu().numpy() for v in values))
        self.bytes += sum(v.nbytes for v in self._batches[-1])

    def write(self, path: Path) -> None:
        """Writes a file of columns."""
        token, c, g, a = (np.concatenate(values) for values in zip(*self._batches, strict=True))
        order = np.argsort(c, kind="stable")
        first = int(token.min()) if len(token) else 0
        starts = np.concatenate([[0], np.bincount(c, minlength=self.C).cumsum()]).astype(np.int64)
        tensors = {
            "starts": starts,
            "tokens": (token[order] - first).astype(np.int32),
            "importances": g[order],
            "activations": a[order],
        }
        write_tensors(path, {key: torch.from_numpy(values) for key, values in tensors.items()}, {"first_token": first})
