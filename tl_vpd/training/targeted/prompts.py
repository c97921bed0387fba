"""Batches of a few prompts, over and over: each batch has prompts of one length, so that nothing is padded.

The length of a step's batch is drawn by how many prompts have it; in the batch every prompt of that length is there equally
often, to one. All of it follows from seed and step alone.

>>> batches = PromptBatches([torch.tensor([1, 2]), torch.tensor([3, 4]), torch.tensor([5, 6, 7])], batch_size=4, seed=0)
>>> batches.context, sorted({batches.at(step).shape for step in range(9)})
(3, [torch.Size([4, 2]), torch.Size([4, 3])])
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor


class PromptBatches:
    """Batches of prompts.

    Args:
        prompts: each a row of tokens.
        batch_size: rows in a batch.
        seed: of the lengths and the order.

    Raises:
        ValueError: there is no prompt, or one is empty.
    """

    def __init__(self, prompts: Sequence[Shaped[Tensor, " _"]], batch_size: int, seed: int) -> None:
        if not prompts or not all(len(prompt) for prompt in prompts):
            raise ValueError("The target has no prompts, or an empty one: give at least one token each.")
        self.batch_size, self.seed, self.n = batch_size, seed, len(prompts)
        lengths = sorted({len(prompt) for prompt in prompts})
        # On the CPU, where rows are chosen and checked without waiting for a device.
        self.groups = [torch.stack([p for p in prompts if len(p) == length]).cpu() for length in lengths]
        self.context = lengths[-1]

    def at(self, step: int) -> Shaped[Tensor, "batch pos"]:
        """The batch of a step."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"prompts/{self.seed}/{step}".encode()))
        number = int(torch.randint(self.n, (), generator=generator))
        for group in self.groups:
            if number < len(group):
                break
            number -= len(group)
        rounds = -(-self.batch_size // len(group))
        order = torch.cat([torch.randperm(len(group), generator=generator) for _ in range(rounds)])
        return group[order[: self.batch_size]]

    def describe(self) -> dict[str, Any]:
        """What distinguishes these prompts from others."""
        digest = hashlib.sha256()
        for group in self.groups:
            digest.update(np.ascontiguousarray(group.cpu().numpy()).tobytes())
        lengths = {str(group.shape[1]): len(group) for group in self.groups}
        return {"rows": self.n, "context": self.context, "lengths": lengths, "sha256": digest.hexdigest()}

    def close(self) -> None:
        """Nothing runs in the background."""
