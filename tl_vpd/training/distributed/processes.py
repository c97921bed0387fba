"""Data parallel training on ``torch.distributed``: each process runs some rows of every batch.

Losses keep the meaning they have for the whole batch: sums are added over processes before anything that is not linear in them
(the frequency loss's logarithm, means over real tokens), and gradients are added, not averaged. Start with ``torchrun``::

    torchrun --nproc-per-node 2 -m tl_vpd.cli train recipe.yaml

What each process stores of V, U, Γ and AdamW's moments: ``tl_vpd.training.distributed.sharding``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """The processes of a run; one alone by default."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and shows the bar."""
        return self.rank == 0

    def rows(self, batch: int) -> range:
        """The rows of a batch that this process runs.

        Raises:
            ValueError: the batch cannot be split evenly.
        """
        if batch % self.size:
            raise ValueError(
                f"batch_size {batch} cannot be split evenly over {self.size} processes: make it a multiple."
            )
        n = batch // self.size
        return range(self.rank * n, (self.rank + 1) * n)

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def largest(self, tensor: Tensor) -> Tensor:
        """The largest values over processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def add_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Adds gradients over processes, in place: no second copy of them is made."""
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        for work in [dist.all_reduce(g, async_op=True) for g in gradients]:
            work.wait()

    def gather_rows(self, tensor: Tensor) -> Tensor:
        """The rows of all processes one after the other."""
        if self.size == 1:
            return tensor
        blocks = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(blocks, tensor.contiguous())
        return torch.cat(blocks)

    def raise_together(self, failure: Exception | None, device: torch.device, elsewhere: str) -> None:
        """Raises in every process what the first one has met (None: nothing).

        Args:
            failure: of the first process.
            device: of the model.
            elsewhere: the message of the OSError that the other processes raise.
        """
        if self.add(torch.tensor(float(failure is not None), device=device)) > 0:
            raise failure or OSError(elsewhere)

    def wait(self) -> None:
        """Until every process has come to this point."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def world(device: torch.device | None = None) -> Iterator[World]:
    """The processes that ``torchrun`` or the caller started; a process group that is made for them is destroyed again.

    Args:
        device: where the model is, which decides what carries the messages (``nccl`` between GPUs, else ``gloo``).
    """
    if dist.is_available() and dist.is_initialized():
        yield World(dist.get_rank(), dist.get_world_size())
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        on_gpu = device is not None and device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if on_gpu else "gloo")
        try:
            yield World(dist.get_rank(), dist.get_world_size())
        finally:
            dist.destroy_process_group()
    else:
        yield World()
