"""What a run trains on: batches by step."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Shaped
from torch import Tensor

EVERY_ROW = slice(None)


@runtime_checkable
class Batches(Protocol):
    """What a run trains on."""

    @property
    def context(self) -> int:
        """Tokens, or vectors, in a row."""

    @property
    def batch_size(self) -> int:
        """Rows in a batch."""

    def at(self, step: int) -> Shaped[Tensor, "batch ..."]:
        """The batch of a step; a run goes through steps in order."""

    def describe(self) -> dict[str, Any]:
        """What distinguishes these rows from others, for resuming."""

    def close(self) -> None:
        """Ends background work."""


class RowsOfBatches:
    """A process's rows of batches that another object makes."""

    def __init__(self, batches: Batches, row_slice: slice) -> None:
        self.batches, self.row_slice = batches, row_slice
        self.context, self.batch_size = batches.context, batches.batch_size

    def at(self, step: int) -> Shaped[Tensor, "rows ..."]:
        """The rows of a step."""
        return self.batches.at(step)[self.row_slice]

    def sample(self) -> Shaped[Tensor, "rows ..."]:
        """Those of the first step."""
        return self.at(0)

    def describe(self) -> dict[str, Any]:
        """The description of the whole batches."""
        return self.batches.describe()

    def close(self) -> None:
        """Ends background work."""
        self.batches.close()
