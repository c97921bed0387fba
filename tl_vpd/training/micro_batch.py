"""How the rows of a batch are split: over processes, over micro-batches, and, in the merged recipe, over two kinds of masks.

A row's number in the whole batch decides its kind, so that the same rows are attacked, and get the same random numbers, however
the batch is split.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

Routing = dict[str, Bool[Tensor, "_ pos"]] | None
"""By site, at which tokens of each row the masked path is computed (None: everywhere)."""


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the model together.

    Attributes:
        order: which of this process's rows, in the order in which they run.
        attacked: where they are among this process's attacked rows.
        stochastic: where they are among its rows with stochastic masks. (Every row is of both kinds unless ``merged``.)
    """

    order: Tensor | slice
    attacked: slice
    stochastic: slice

    def select(self, tensor: Tensor | None) -> Tensor | None:
        """These rows of a tensor with all of the process's rows."""
        return None if tensor is None else tensor[self.order]

    def row_numbers(self, rows: Sequence[int]) -> Sequence[int]:
        """These rows of a sequence with all of the process's rows."""
        return rows[self.order] if isinstance(self.order, slice) else [rows[i] for i in self.order.tolist()]


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


def split_batch(rows: Sequence[int], micro_batch: int | None, *, merged: float = 0.0) -> BatchSplit:
    """Splits a process's rows.

    Args:
        rows: their numbers in the whole batch.
        micro_batch: rows that run at once (None: all).
        merged: the proportion of rows that are attacked while the others get stochastic masks, in one pass (0: all rows are of
            both kinds).

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
        order: Tensor | slice = slice(start, start + len(block))
        if merged:
            order = torch.tensor(
                [start + i for kind in (True, False) for i, row in enumerate(block) if is_attacked(row) == kind]
            )
        ends = first_attacked + n_attacked, first_stochastic + n_stochastic
        micro_batches.append(MicroBatch(order, slice(first_attacked, ends[0]), slice(first_stochastic, ends[1])))
        first_attacked, first_stochastic = ends
    return BatchSplit(rows, attacked, stochastic, tuple(micro_batches))


def select_rows(routing: Routing, rows: slice) -> Routing:
    """The routing of a slice of rows."""
    return None if routing is None else {name: routed[rows] for name, routed in routing.items()}


def concatenate_routing(attacked: Routing, stochastic: Routing, n_attacked: int, n_stochastic: int) -> Routing:
    """One routing for attacked rows followed by rows with stochastic masks."""
    if attacked is None and stochastic is None:
        return None
    names = attacked if attacked is not None else stochastic
    assert names is not None
    rows: dict[str, Tensor] = {}
    for name, either in names.items():
        everywhere = either.new_ones(n_attacked + n_stochastic, either.shape[1])
        first = everywhere[:n_attacked] if attacked is None else attacked[name]
        last = everywhere[:n_stochastic] if stochastic is None else stochastic[name]
        rows[name] = torch.cat([first, last])
    return rows
