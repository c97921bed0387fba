"""Rows of a model's data, and batches of them with the target's output and the importances at every token.

A ``BatchStore`` keeps batches between passes over the rows while they fit into a number of bytes. The others are computed again
in each pass: slower, with the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from tl_vpd.evaluation.intervals import PerRow
from tl_vpd.losses import Reconstruction
from tl_vpd.losses.precision import at_least_float32


@dataclass(frozen=True)
class Rows:
    """Rows of tokens (or of the input of a custom model), where they are real, and their numbers in the data.

    Whatever is random about a row depends on its number, not on the rows beside it.
    """

    tokens: Shaped[Tensor, "row ..."]
    token_mask: Bool[Tensor, "row pos"] | None
    numbers: list[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, indices: slice | Sequence[int]) -> Rows:
        """Some of these rows, in the order of the indices."""
        index = indices if isinstance(indices, slice) else torch.tensor(indices, device=self.tokens.device)
        token_mask = None if self.token_mask is None else self.token_mask[index]
        numbers = self.numbers[indices] if isinstance(indices, slice) else [self.numbers[i] for i in indices]
        return Rows(self.tokens[index], token_mask, numbers)


@dataclass(frozen=True)
class Batch:
    """Rows that run together, after a clean pass.

    ``g``: importances ``[row, pos, C_total]`` (``[row, C_total]`` for inputs without positions). ``reconstruction``: the
    distance of an output from the target's. ``target_ce``: the target's cross-entropy of the next token (None: the model returns
    no logits). ``residual``: what enters the first decomposed block, where masked passes start (None: every block runs).
    """

    rows: Rows
    g: Float[Tensor, "row *pos C_total"]
    reconstruction: Reconstruction
    target_ce: PerRow | None
    residual: Float[Tensor, "row pos d_model"] | None = None

    @property
    def real(self) -> Bool[Tensor, "row *pos"]:
        """True at real tokens."""
        token_mask = self.rows.token_mask
        return torch.ones_like(self.g[..., 0], dtype=torch.bool) if token_mask is None else token_mask

    @property
    def tokens_by_row(self) -> Float[np.ndarray, " row"]:
        """The number of real tokens of every row."""
        return self.real.reshape(len(self.g), -1).sum(1).double().cpu().numpy()

    @property
    def n_tokens(self) -> int:
        """The number of real tokens."""
        return int(self.real.sum())

    @property
    def n_bytes(self) -> int:
        """The memory of the importances, of the target's output and of the residual stream."""
        tensors = (self.g, self.reconstruction.target, self.residual)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    @torch.no_grad()
    def distance(self, output: Float[Tensor, "row ..."]) -> PerRow:
        """The mean distance of every row's output from the target's, over real tokens."""
        counts = self.tokens_by_row
        values = [
            float(self.reconstruction.rows(slice(i, i + 1))(output[i : i + 1])) if n else 0.0
            for i, n in enumerate(counts)
        ]
        return PerRow(np.array(values, dtype=float), counts)

    def ce(self, output: Float[Tensor, "row pos vocab"]) -> PerRow:
        """The cross-entropy of the next token in every row."""
        return ce_by_row(output, self.rows.tokens, self.rows.token_mask)


class BatchStore:
    """Batches that are kept between passes, in the order in which they come, while they fit.

    Args:
        limit: bytes of importances and outputs that are kept at most.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.n_bytes = limit, 0
        self._batches: dict[tuple[int, ...], Batch] = {}

    def get(self, rows: Rows, compute: Callable[[Rows], Batch]) -> Batch:
        """The batch of these rows, computed unless it is kept."""
        key = tuple(rows.numbers)
        if key in self._batches:
            return self._batches[key]
        batch = compute(rows)
        if self.n_bytes + batch.n_bytes <= self.limit:
            self._batches[key] = batch
            self.n_bytes += batch.n_bytes
        return batch

    def clear(self) -> None:
        """Drops all batches."""
        self._batches.clear()
        self.n_bytes = 0


@torch.no_grad()
def ce_by_row(
    logits: Float[Tensor, "row pos vocab"],
    tokens: Shaped[Tensor, "row pos"],
    token_mask: Bool[Tensor, "row pos"] | None,
) -> PerRow:
    """Mean cross-entropy of the next token of every row, in nats, over pairs of real tokens."""
    pairs = (
        torch.ones_like(tokens[:, 1:], dtype=torch.bool)
        if token_mask is None
        else token_mask[:, :-1] & token_mask[:, 1:]
    )
    losses = F.cross_entropy(at_least_float32(logits[:, :-1].flatten(0, 1)), tokens[:, 1:].flatten(), reduction="none")
    sums = (losses.view(pairs.shape).double() * pairs).sum(1)
    counts = pairs.sum(1).double()
    return PerRow((sums / counts.clamp(min=1)).cpu().numpy(), counts.cpu().numpy())
