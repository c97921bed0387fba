"""Random numbers that belong to a row: each row of a batch draws from (seed, name, step, row) alone.

A draw depends neither on earlier draws nor on the process or micro-batch in which the row is handled. A run that is resumed,
split into micro-batches or spread over processes draws the same numbers, and so does an evaluation with any batch size.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

SPREAD = 1 << 17
"""Numbers from which on rows are filled on several cores."""


class RowRandom:
    """Random tensors with one row for each row of a batch, made on a device."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed = seed
        self.generator = torch.Generator(device)

    def rows(
        self, what: str, step: int, rows: Sequence[int], draw: Callable[[torch.Generator], Tensor]
    ) -> Shaped[Tensor, "rows ..."]:
        """One result of ``draw`` for each row; ``what`` distinguishes the tensors of one step."""
        results = []
        for row in rows:
            self.generator.manual_seed(self._mixed(what, step, row))
            results.append(draw(self.generator))
        return torch.stack(results)

    def uniform(
        self, what: str, step: int, rows: Sequence[int], shape: tuple[int, ...], *, out: Tensor | None = None
    ) -> Float[Tensor, "rows ..."]:
        """Uniform numbers in [0, 1), each row of ``shape``; written into ``out`` where one is passed."""
        if out is None:
            out = torch.empty(len(rows), *shape, device=self.generator.device)
        threads = torch.get_num_threads() if out.device.type == "cpu" and out.numel() >= SPREAD else 1

        def fill(k: int, generator: torch.Generator) -> None:
            for values, row in zip(out[k::threads], rows[k::threads], strict=True):
                generator.manual_seed(self._mixed(what, step, row))
                values.uniform_(generator=generator)

        if threads == 1:
            fill(0, self.generator)
        else:  # PyTorch fills from one generator on one core
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(fill, range(threads), [torch.Generator() for _ in range(threads)]))
        return out

    def _mixed(self, what: str, step: int, row: int) -> int:
        """A generator's seed: on a CPU it uses 32 bits, so the four values are mixed into those."""
        return zlib.crc32(f"{self.seed}/{what}/{step}/{row}".encode())
