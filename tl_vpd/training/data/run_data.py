"""What a run trains on, on the device of its model, with the padding of each batch."""

from __future__ import annotations

from typing import Any

from jaxtyping import Bool, Shaped
from torch import Tensor

from tl_vpd.adapters import Adapter
from tl_vpd.training.data.batches import ProcessBatches, batches_of
from tl_vpd.training.data.datasets import is_dataset, token_column
from tl_vpd.training.distributed.processes import World

Rows = tuple[Shaped[Tensor, "batch ..."], Bool[Tensor, "batch pos"] | None]
"""Rows, and which of their tokens are real (None: all)."""


class RunData:
    """The batches of a run for a model.

    Args:
        adapter: of the model.
        batches: this process's rows of each.
        rows: how many these are.

    Raises:
        ValueError: the model cannot read these rows.
    """

    def __init__(self, adapter: Adapter, batches: ProcessBatches, rows: int) -> None:
        self.adapter, self.batches, self.rows = adapter, batches, rows
        self.sample = batches.sample()
        """A few rows."""
        if self.sample.is_floating_point() and self.sample.dtype != adapter.dtype:
            raise ValueError(
                f"The data holds vectors in {self.sample.dtype} and the model is in {adapter.dtype}: convert either, such as "
                f"with data.astype('float32') or model.double()."
            )
        adapter.tokens(self.sample)

    @property
    def context(self) -> int:
        """Positions of a row."""
        return self.batches.context

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Rows and positions of each stream's batches."""
        return [(self.rows, self.context)]

    def at(self, step: int) -> tuple[Any, ...]:
        """The batch of a step, as ``Trainer.step`` takes it."""
        return self._rows(self.batches.at(step))

    def first(self, n: int) -> Rows:
        """A few rows to measure on."""
        return self._rows(self.sample[:n])

    def describe(self) -> dict[str, Any]:
        """What distinguishes these rows from others, for resuming."""
        return self.batches.describe()

    def close(self) -> None:
        """Ends background work."""
        self.batches.close()

    def _rows(self, rows: Tensor) -> Rows:
        """The padding is found where the rows are: on the CPU that waits for nothing."""
        return self.adapter.tokens(rows), self.adapter.padding(rows, None)


def run_data(
    adapter: Adapter, data: Any, batch_size: int, seed: int, processes: World, *, context: int | None = None
) -> RunData:
    """This process's rows of each batch, after a look at some of them.

    Args:
        adapter: of the model.
        data: what ``decompose`` takes.
        batch_size: rows in a batch, over all processes.
        seed: of the order.
        processes: that split the batch.
        context: length of the rows that a dataset of text is cut into (None: the model's context).

    Raises:
        ValueError: the data does not fit the model, or ``context`` would do nothing.
        TypeError: it is not data.
    """
    if context is not None and not (is_dataset(data) and token_column(data) is None):
        raise ValueError(f"context={context} would do nothing: only datasets of text are cut into rows.")
    if is_text(data) or isinstance(data, Tensor):
        data = adapter.tokens(data)
        data = data if data.is_floating_point() else data.cpu()  # where each step's rows are checked without waiting
    rows = processes.rows(batch_size)
    batches = batches_of(
        data,
        batch_size,
        seed,
        tokenizer=getattr(adapter.model, "tokenizer", None),
        context=context or getattr(getattr(adapter.model, "cfg", None), "n_ctx", None),
        row_slice=slice(rows.start, rows.stop),
    )
    return RunData(adapter, batches, len(rows))


def is_text(data: Any) -> bool:
    """Whether data is a string or a list of strings."""
    return isinstance(data, str) or (isinstance(data, list) and bool(data) and isinstance(data[0], str))
