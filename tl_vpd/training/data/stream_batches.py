"""Batches of rows that can only be read one after the other."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from tl_vpd.training.data.prefetch import Prefetcher
from tl_vpd.training.data.protocol import EVERY_ROW


class StreamBatches:
    """Batches of the rows of an iterable, read ahead by a thread; at its end it starts again.

    Args:
        rows: tensors, arrays, lists, or mappings with ``tokens`` or ``input_ids``.
        batch_size: rows in a batch, over all processes.
        row_slice: which of a batch's rows this process keeps.

    Raises:
        ValueError: it has no rows, a row is shorter than the first, or it cannot be iterated twice.
    """

    def __init__(self, rows: Iterable[Any], batch_size: int, *, row_slice: slice = EVERY_ROW) -> None:
        if iter(rows) is rows:
            raise ValueError("The tokens can be read only once, so a run could not resume: pass a list or a dataset.")
        self.rows, self.batch_size, self.row_slice = rows, batch_size, row_slice
        first = next(iter(rows), None)
        if first is None:
            raise ValueError("There are no tokens: the data has no rows.")
        self._first = row_of(first)
        self.context = len(self._first)
        self._prefetcher = Prefetcher(self._batches)

    def at(self, step: int) -> Int[Tensor, "rows pos"]:
        """The batch of a step; the first may be any, and each later one follows the one before."""
        return self._prefetcher.at(step)

    def sample(self) -> Int[Tensor, "1 pos"]:
        """The first row."""
        return self._first[None]

    def describe(self) -> dict[str, Any]:
        """The context and a checksum of the first row; later rows cannot be known without reading them."""
        digest = hashlib.sha256(self._first.numpy().tobytes()).hexdigest()
        return {"rows": "a stream", "context": self.context, "sha256": digest}

    def close(self) -> None:
        """Ends the thread."""
        self._prefetcher.close()

    def _endless(self, skip: int) -> Iterator[Tensor]:
        """The rows, again and again, without the first ``skip``."""
        if skip and hasattr(self.rows, "skip"):
            any_left = False
            for row in self.rows.skip(skip):
                any_left = True
                yield row_of(row)
            skip = 0 if any_left else skip
        while True:
            n = 0
            for n, row in enumerate(self.rows, start=1):
                if n > skip:
                    yield row_of(row)
            if not n:
                raise ValueError("The data has no rows.")
            skip = max(0, skip - n)

    def _batches(self, step: int) -> Iterator[Tensor]:
        rows = self._endless(step * self.batch_size)
        while True:
            batch = list(islice(rows, self.batch_size))
            if any(len(row) < self.context for row in batch):
                raise ValueError(f"A row of the data has fewer tokens than the first ({self.context}).")
            yield torch.stack([row[: self.context] for row in batch[self.row_slice]])


def row_of(row: Any) -> Int[Tensor, " pos"]:
    """A row as int64 tokens."""
    if isinstance(row, str):
        raise ValueError(
            "A row of the tokens is a text: pass a list of strings, or a split of the dataset, such as dataset['train']."
        )
    if isinstance(row, Mapping):
        key = "tokens" if "tokens" in row else "input_ids"
        if key not in row:
            raise ValueError(f"A row has {', '.join(row)}; 'tokens' or 'input_ids' is needed.")
        row = row[key]
    if not isinstance(row, Tensor):
        array = np.asarray(row)
        if array.dtype.kind not in "biuf":
            raise ValueError(f"A row of the tokens is {array.dtype} of shape {array.shape}; integers [pos] are needed.")
        row = torch.from_numpy(array)
    tokens = row
    if tokens.ndim != 1 or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise ValueError(
            f"A row of the tokens is {tokens.dtype} of shape {tuple(tokens.shape)}; integers [pos] are needed."
        )
    return tokens.long()
