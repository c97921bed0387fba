"""How the rows of a batch are shared out: over processes, over micro-batches, and, in the merged recipe, over two kinds of masks.

A row's number in the whole batch decides what it is, so that the same rows are attacked, and get the same random numbers, however
the batch is split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

Routing = dict[str, Bool[Tensor, "_ pos"]] | None
"""By site, at which tokens of each row the masked path is taken (None: everywhere)."""


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the model together.

    ``order``: which of this process's rows, in the order they are run. ``attacked``, ``drawn``: where they lie among its attacked
    rows and its stochastic rows; with a pass for each kind of mask every row is both.
    """

    order: Tensor | slice
    attacked: slice
    drawn: slice

    def of(self, tensor: Tensor | None) -> Tensor | None:
        """These rows of a tensor with all of the process's rows."""
        return None if tensor is None else tensor[self.order]

    def numbers(self, rows: Sequence[int]) -> Sequence[int]:
        """These rows of a sequence with all of the process's rows."""
        return rows[self.order] if isinstance(self.order, slice) else [rows[i] for i in self.order.tolist()]


@dataclass(frozen=True)
class BatchSplit:
    """All of a process's rows: ``rows`` their numbers in the whole batch, ``attacked`` and ``drawn`` those of each kind."""

    rows: Sequence[int]
    attacked: Sequence[int]
    drawn: Sequence[int]
    micro_batches: tuple[MicroBatch, ...]


def share(rows: Sequence[int], micro_batch: int | None, *, merged: bool) -> BatchSplit:
    """Splits a process's rows.

    Args:
        rows: their numbers in the whole batch. micro_batch: rows run at once (None: all). merged: whether even rows are attacked
            and odd ones get stochastic masks, in one pass.

    Raises:
        ValueError: a merged part has rows of one kind only.
    """
    rows = list(rows)
    attacked = [r for r in rows if not merged or r % 2 == 0]
    drawn = [r for r in rows if not merged or r % 2 == 1]
    parts, a, d = [], 0, 0
    size = len(rows) if micro_batch is None else micro_batch
    for start in range(0, len(rows), size):
        own = rows[start : start + size]
        n_attacked = sum(not merged or r % 2 == 0 for r in own)
        n_drawn = sum(not merged or r % 2 == 1 for r in own)
        if not n_attacked or not n_drawn:
            raise ValueError(
                f"merged=True needs rows of both kinds in every micro-batch and process; one has {len(own)}."
            )
        order: Tensor | slice = slice(start, start + len(own))
        if merged:
            order = torch.tensor([start + i for kind in (0, 1) for i, r in enumerate(own) if r % 2 == kind])
        parts.append(MicroBatch(order, slice(a, a + n_attacked), slice(d, d + n_drawn)))
        a, d = a + n_attacked, d + n_drawn
    return BatchSplit(rows, attacked, drawn, tuple(parts))


def routed_rows(routing: Routing, rows: slice) -> Routing:
    """The routing of some rows."""
    return None if routing is None else {name: own[rows] for name, own in routing.items()}


def joined_routing(attacked: Routing, drawn: Routing, rows: slice) -> Routing:
    """One routing for attacked rows followed by the others."""
    if attacked is None and drawn is None:
        return None
    some = drawn if drawn is not None else attacked
    assert some is not None
    joined = {}
    for name, own in some.items():
        ones = torch.ones(rows.stop, own.shape[1], dtype=torch.bool, device=own.device)
        first = ones if attacked is None else attacked[name]
        last = own if drawn is not None else torch.ones_like(own)
        joined[name] = torch.cat([first, last])
    return joined
