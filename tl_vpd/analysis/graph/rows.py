"""Which gradients a graph needs, and their batches.

All targets that read one input tensor at one position are products ``V[:, c] · x``. Of n such targets either each is a row (one
gradient), or, where n exceeds the width of x, each entry of x is, and targets are combinations of rows. So there are never more
than ``d_in`` rows for an input and position, however many targets; Q, K and V (and gate and in) share theirs. In a causal model a
row of position t is taken of the prompt up to t only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """The targets of one input tensor at one position.

    Attributes:
        site: whose input it is (the first, of sites that share it).
        pos: the position.
        nodes: the targets' numbers among the graph's nodes.
        seeds: one row per gradient.
        combine: makes targets of rows (None: they are the rows).
    """

    site: str
    pos: int
    nodes: Int[Tensor, " targets"]
    seeds: Float[Tensor, "rows d_in"]
    combine: Float[Tensor, "targets rows"] | None

    @classmethod
    def of(cls, site: str, pos: int, nodes: Int[Tensor, " targets"], reads: Float[Tensor, "targets d_in"]) -> Block:
        """The block of targets that read along ``reads``."""
        if len(reads) <= reads.shape[1]:
            return cls(site, pos, nodes, reads, None)
        identity = torch.eye(reads.shape[1], dtype=reads.dtype, device=reads.device)
        return cls(site, pos, nodes, identity, reads)


Batch = list[tuple[Block, slice, slice]]
"""For each block in a batch, which of the block's rows are in it and at which rows of the batch."""


@dataclass(frozen=True)
class Group:
    """Blocks run together: on the first ``length`` tokens, ``copies`` rows at once."""

    length: int
    copies: int
    blocks: tuple[Block, ...]

    def batches(self) -> Iterator[Batch]:
        """All rows, in batches of ``copies``."""
        batch: Batch = []
        used = 0
        for block in self.blocks:
            start = 0
            while start < len(block.seeds):
                n = min(self.copies - used, len(block.seeds) - start)
                batch.append((block, slice(start, start + n), slice(used, used + n)))
                used, start = used + n, start + n
                if used == self.copies:
                    yield batch
                    batch, used = [], 0
        if batch:
            yield batch


def groups(
    blocks: Sequence[Block], order: Sequence[str], length: int, tokens_at_once: int, *, causal: bool
) -> list[Group]:
    """Blocks by position, so that no row is run on more tokens than it needs where that would cost a batch.

    Positions go together while the rows of their fullest input fit in one batch of ``tokens_at_once`` rows × positions. Within a
    group, blocks stand in the ``order`` of the forward pass, so that a batch goes no deeper than it must.
    """
    depth = {site: i for i, site in enumerate(order)}
    by_position: dict[int, list[Block]] = {}
    for block in blocks:
        by_position.setdefault(block.pos if causal else 0, []).append(block)
    result: list[Group] = []
    waiting: list[Block] = []
    top = 0

    def close() -> None:
        if waiting:
            run = top + 1 if causal else length
            most = max(1, tokens_at_once // run)
            ordered = sorted(waiting, key=lambda block: (depth[block.site], block.pos))
            rows = sum(len(block.seeds) for block in ordered)
            result.append(Group(run, min(most, rows, max(32, _fullest(ordered))), tuple(ordered)))
            waiting.clear()

    for pos in sorted(by_position, reverse=True):
        if waiting and _fullest([*waiting, *by_position[pos]]) * (top + 1) > tokens_at_once:
            close()
        if not waiting:
            top = pos
        waiting.extend(by_position[pos])
    close()
    return result


def _fullest(blocks: Sequence[Block]) -> int:
    rows: dict[str, int] = {}
    for block in blocks:
        rows[block.site] = rows.get(block.site, 0) + len(block.seeds)
    return max(rows.values())
