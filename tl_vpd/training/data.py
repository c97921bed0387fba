"""Token batches in an order that follows from seed and step alone, so that a resumed run sees what it would have seen.

Each epoch is a fresh permutation of the rows, drawn from (seed, epoch); a batch that would reach past an epoch's end starts
the next one.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor


class TokenBatches:
    """Batches of rows of a token tensor ``[n, pos]``.

    Raises:
        ValueError: there are fewer rows than a batch takes.
    """

    def __init__(self, tokens: Int[Tensor, "n pos"], batch_size: int, seed: int) -> None:
        if len(tokens) < batch_size:
            raise ValueError(f"There are {len(tokens)} rows of tokens and batch_size is {batch_size}: give more rows.")
        self.tokens, self.batch_size, self.seed = tokens, batch_size, seed
        self.per_epoch = len(tokens) // batch_size
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.long)

    def at(self, step: int) -> Int[Tensor, "batch pos"]:
        """The batch of a step."""
        epoch, index = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            # A large odd multiplier keeps the streams of different seeds apart.
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = torch.randperm(len(self.tokens), generator=generator)
            self._epoch = epoch
        rows = self._order[index * self.batch_size : (index + 1) * self.batch_size]
        return self.tokens[rows.to(self.tokens.device)].long()
