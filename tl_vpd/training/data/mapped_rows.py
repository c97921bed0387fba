"""Rows of a memory-mapped array, read from its file: a file that is cut while a run reads it gives an error.

Through the mapping itself, the process would be ended by the system (SIGBUS).

>>> array = np.load("tokens.npy", mmap_mode="r")                   # doctest: +SKIP
>>> rows = MappedRows(array, mapping_of(array))                    # doctest: +SKIP
>>> rows[np.array([3, 1])].shape                                   # doctest: +SKIP
(2, 1024)
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np


class MappedRows:
    """The rows of an array in a file.

    Args:
        array: memory-mapped, or a view of such an array.
        mapping: the array of the whole mapping (``mapping_of``).

    Raises:
        ValueError: it is mapped in mode ``c``, whose changes are not in the file.
        OSError: the file cannot be opened.
    """

    def __init__(self, array: np.ndarray, mapping: np.memmap) -> None:
        if mapping.mode == "c":
            raise ValueError("The tokens are memory-mapped in mode 'c': open the file with mode 'r'.")
        self.path, self.shape, self.dtype, self.strides = str(mapping.filename), array.shape, array.dtype, array.strides
        addresses = [a.__array_interface__["data"][0] for a in (array, mapping)]
        self._start = int(mapping.offset) + addresses[0] - addresses[1]
        self._file = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._file)

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        result = np.empty((len(rows), *self.shape[1:]), self.dtype)
        for i, row in enumerate(rows.tolist()):
            result[i] = self._read(self._start + row * self.strides[0], self.shape[1:], self.strides[1:])
        return result

    def _read(self, at: int, shape: Sequence[int], strides: Sequence[int]) -> np.ndarray:
        """An entry of an axis: in one piece where it lies in one."""
        size = self.dtype.itemsize
        if (shape and strides[-1] != size) or (len(shape) > 1 and strides[0] != shape[-1] * size):
            return np.stack([self._read(at + i * strides[0], shape[1:], strides[1:]) for i in range(shape[0])])
        n = size * int(np.prod(shape))
        data = self._bytes(n, at)
        if len(data) < n:
            raise OSError(
                f"{self.path} became shorter while its tokens were read: put the file back and resume the run."
            )
        return np.frombuffer(data, self.dtype).reshape(shape)

    def _bytes(self, n: int, at: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(self._file, n, at)
        os.lseek(self._file, at, os.SEEK_SET)
        return os.read(self._file, n)


def mapping_of(array: np.ndarray) -> np.memmap | None:
    """The array of the mapped file that an array is a view of (None: it is in memory, or the file has no name)."""
    root: Any = array
    while isinstance(root, np.ndarray):
        if isinstance(root, np.memmap) and isinstance(root.base, mmap.mmap):
            return root if root.filename is not None else None
        root = root.base
    return None
