"""What a run draws at random: for every row of a batch from (seed, step, row) alone.

A draw does not depend on what was drawn before it, nor on which process or part of the batch the row is handled in: a run
resumed, split into micro-batches or spread over processes draws the same numbers.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

START = -1
"""The step of what is drawn before the first."""
SPREAD = 1 << 17
"""Numbers from which on rows are drawn on several cores."""


class RowRandom:
    """Random tensors with one row for each row of a batch.

    Args:
        seed: of the run. device: where the numbers are drawn and stay.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed = seed
        self.generator = torch.Generator(device)

    def rows(
        self, what: str, step: int, rows: Sequence[int], draw: Callable[[torch.Generator], Tensor]
    ) -> Shaped[Tensor, "rows ..."]:
        """One result of ``draw`` a row; ``what`` tells apart the tensors of one step."""
        drawn = []
        for row in rows:
            self.generator.manual_seed(self._mixed(what, step, row))
            drawn.append(draw(self.generator))
        return torch.stack(drawn)

    def uniform(
        self, what: str, step: int, rows: Sequence[int], shape: tuple[int, ...], *, out: Tensor | None = None
    ) -> Float[Tensor, "rows ..."]:
        """Uniform numbers in [0, 1), each row ``shape``; into ``out`` where it is given."""
        if out is None:
            out = torch.empty(len(rows), *shape, device=self.generator.device)
        threads = torch.get_num_threads() if out.device.type == "cpu" and out.numel() >= SPREAD else 1

        def fill(k: int, generator: torch.Generator) -> None:
            for own, row in zip(out[k::threads], rows[k::threads], strict=True):
                generator.manual_seed(self._mixed(what, step, row))
                own.uniform_(generator=generator)

        if threads == 1:
            fill(0, self.generator)
        else:  # PyTorch draws from one generator on one core
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(fill, range(threads), [torch.Generator() for _ in range(threads)]))
        return out

    def _mixed(self, what: str, step: int, row: int) -> int:
        """A generator's seed: on a CPU it uses 32 bits, so the four numbers are mixed into those."""
        return zlib.crc32(f"{self.seed}/{what}/{step}/{row}".encode())
