"""How the rows of a batch are split: over processes, over micro-batches, and, in the merged recipe, over two kinds of masks.

A row's number in the whole batch decides its kind, so that the same rows are attacked, and get the same random numbers, however
the batch is split.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the model together.

    Attributes:
        numbers: which of this process's rows, in the order in which they run.
        order: the same, as an index on the device.
        attacked: where they are among this process's attacked rows.
        stochastic: where they are among its rows with stochastic masks. (Every row is of both kinds unless ``merged``.)
    """

    numbers: Sequence[int]
    order: Tensor | slice
    attacked: slice
    stochastic: slice

    def select(self, tensor: Tensor | None) -> Tensor | None:
        """These rows of a tensor with all of the process's rows."""
        return None if tensor is None else tensor[self.order]


@dataclass(frozen=True)
class BatchSplit:
    """All of a process's rows.

    Attributes:
        rows: their numbers in the whole batch.
        attacked: the numbers of those that are attacked.
        stochastic: the numbers of those with stochastic masks.
        micro_batches: the rows that run together.
    """

    rows: Sequence[int]
    attacked: Sequence[int]
    stochastic: Sequence[int]
    micro_batches: tuple[MicroBatch, ...]


def attacked_among_first(n: int, proportion: float) -> int:
    """How many of a batch's first ``n`` rows are attacked.

    >>> [attacked_among_first(n, 0.5) for n in range(5)], attacked_among_first(32, 0.9)
    ([0, 1, 1, 2, 2], 29)
    """
    return math.ceil(round(n * proportion, 9))  # rounded: 100 · 0.55 is above 55 in floating point


def split_batch(
    rows: Sequence[int], micro_batch: int | None, *, merged: float = 0.0, device: torch.device | None = None
) -> BatchSplit:
    """Splits a process's rows.

    Args:
        rows: their numbers in the whole batch.
        micro_batch: rows that run at once (None: all).
        merged: the proportion of rows that are attacked while the others get stochastic masks, in one pass (0: all rows are of
            both kinds).
        device: of the batch (None: the CPU).

    Raises:
        ValueError: the rows are of one kind only, and merged.
    """
    rows = list(rows)

    def is_attacked(row: int) -> bool:
        return attacked_among_first(row + 1, merged) > attacked_among_first(row, merged)

    attacked = [row for row in rows if not merged or is_attacked(row)]
    stochastic = [row for row in rows if not merged or not is_attacked(row)]
    if not attacked or not stochastic:
        fewest = math.ceil(round(1 / min(merged, 1 - merged), 9))
        raise ValueError(
            f"merged={merged} needs rows of both kinds in every process, and one has {len(rows)} "
            f"row{'s' if len(rows) > 1 else ''}: make batch_size / processes at least {fewest}."
        )
    micro_batches, first_attacked, first_stochastic = [], 0, 0
    size = len(rows) if micro_batch is None else micro_batch
    for start in range(0, len(rows), size):
        block = rows[start : start + size]
        n_attacked = sum(not merged or is_attacked(row) for row in block)
        n_stochastic = sum(not merged or not is_attacked(row) for row in block)
        numbers = list(range(start, start + len(block)))
        order: Tensor | slice = slice(start, start + len(block))
        if merged:
            numbers.sort(key=lambda i: not is_attacked(rows[i]))  # which keeps the order of each kind
            order = torch.tensor(numbers, device=device)
        ends = first_attacked + n_attacked, first_stochastic + n_stochastic
        micro_batches.append(
            MicroBatch(numbers, order, slice(first_attacked, ends[0]), slice(first_stochastic, ends[1]))
        )
        first_attacked, first_stochastic = ends
    return BatchSplit(rows, attacked, stochastic, tuple(micro_batches))
