"""Batches of rows that can be read in any order: a tensor, an array, or a dataset on disk."""

from __future__ import annotations

import hashlib
from itertools import count
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from tl_vpd.training.data.datasets import DatasetRows
from tl_vpd.training.data.mapped_rows import MappedRows
from tl_vpd.training.data.prefetch import Prefetcher
from tl_vpd.training.data.protocol import EVERY_ROW

SAMPLE = 256
"""Rows that are checked before a run, where all are too many to read."""


class TokenBatches:
    """Batches of rows of tokens ``[n, pos]`` or vectors ``[n, pos, d]`` or ``[n, d]``, each epoch in a new random order.

    A batch that would reach past an epoch's end starts the next one.

    Args:
        tokens: the rows.
        batch_size: rows in a batch, over all processes.
        seed: of the order.
        row_slice: which of a batch's rows this process reads.

    Raises:
        ValueError: there are fewer rows than in a batch.
    """

    def __init__(
        self,
        tokens: Shaped[Tensor, "n _ ..."] | np.ndarray | MappedRows | DatasetRows,
        batch_size: int,
        seed: int,
        *,
        row_slice: slice = EVERY_ROW,
    ) -> None:
        if len(tokens) < batch_size:
            raise ValueError(f"There are {len(tokens)} rows of tokens and batch_size is {batch_size}: give more rows.")
        self.tokens = tokens.detach() if isinstance(tokens, Tensor) else tokens
        self.batch_size, self.seed, self.row_slice = batch_size, seed, row_slice
        self.context = 1 if holds_vectors(tokens) and len(tokens.shape) == 2 else int(tokens.shape[1])
        self.per_epoch = len(tokens) // batch_size
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.long)
        in_memory = isinstance(tokens, Tensor | np.ndarray)
        self._prefetcher = None if in_memory else Prefetcher(lambda step: map(self._read, count(step)))

    def at(self, step: int) -> Shaped[Tensor, "rows _ ..."]:
        """The batch of a step."""
        return self._read(step) if self._prefetcher is None else self._prefetcher.at(step)

    def _read(self, step: int) -> Tensor:
        epoch, index = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            # A large odd multiplier separates the streams of different seeds.
            generator = torch.Generator().manual_seed(_in_64_bits(self.seed * 1_000_003 + epoch))
            self._order = torch.randperm(len(self.tokens), generator=generator)
            self._epoch = epoch
        return self._rows(self._order[index * self.batch_size : (index + 1) * self.batch_size][self.row_slice])

    def _rows(self, indices: Int[Tensor, " rows"]) -> Tensor:
        if isinstance(self.tokens, Tensor):
            rows = self.tokens[indices.to(self.tokens.device)]
            return rows if rows.is_floating_point() else rows.long()
        if holds_vectors(self.tokens):
            return torch.from_numpy(np.array(self.tokens[indices.numpy()]))
        return torch.from_numpy(np.asarray(self.tokens[indices.numpy()]).astype(np.int64))

    def sample(self) -> Shaped[Tensor, "rows _ ..."]:
        """Rows from all parts of the data: all of a tensor's, otherwise a few."""
        n = len(self.tokens)
        return self._rows(torch.arange(n) if isinstance(self.tokens, Tensor) else torch.from_numpy(_spread(n)))

    def describe(self) -> dict[str, Any]:
        """Rows, context, a checksum of a sample of rows, and, where all are in memory, one of all."""
        rows = self.tokens
        if isinstance(rows, Tensor):
            rows = (rows.view(torch.int16) if rows.dtype == torch.bfloat16 else rows).cpu().numpy()
        description = {
            "rows": len(rows),
            "context": self.context,
            "sha256_of_sample": _digest(rows[_spread(len(rows))]),
        }
        if isinstance(rows, np.ndarray):
            description["sha256"] = _digest(rows)
        return description

    def close(self) -> None:
        """Ends the thread, if there is one."""
        if self._prefetcher is not None:
            self._prefetcher.close()


def holds_vectors(rows: Tensor | np.ndarray | MappedRows | DatasetRows) -> bool:
    """Whether rows are floating-point vectors, not tokens."""
    if isinstance(rows, Tensor):
        return rows.is_floating_point()
    return isinstance(rows, np.ndarray | MappedRows) and np.issubdtype(rows.dtype, np.floating)


def _digest(rows: np.ndarray) -> str:
    """A checksum; the same tokens in another integer type are the same tokens."""
    rows = rows.astype(np.int64) if np.issubdtype(rows.dtype, np.integer) else rows
    return hashlib.sha256(np.ascontiguousarray(rows).tobytes()).hexdigest()


def _in_64_bits(seed: int) -> int:
    """The seed, reduced to what PyTorch accepts where it is larger."""
    return seed if -(1 << 63) <= seed < 1 << 63 else seed % (1 << 63)


def _spread(n: int) -> np.ndarray:
    return np.linspace(0, n - 1, min(n, SAMPLE)).astype(int)
