"""Token batches in an order that follows from seed and step alone, so that a resumed run reads what it would have read.

==============================  =======================================================================================
data                            order
==============================  =======================================================================================
tensor or array ``[n, pos]``    each epoch is a new permutation of the rows, from (seed, epoch); an array may be
                                memory-mapped (``numpy.load(path, mmap_mode="r")``) and larger than memory: a step reads
                                its rows only
any other iterable of rows      as they come; resuming reads past the rows of earlier steps. It must start again each time it
                                is iterated (a list, a dataset, an object with ``__iter__``; not a generator)
dataset of Hugging Face         of ``tokens`` as above; of text, tokenised by TransformerLens's ``tokenize_and_concatenate``
an object with ``at(step)``     whatever it makes for a step (``Batches``): unlimited data, such as that of ``tl_vpd.toys``
==============================  =======================================================================================

Custom models may take vectors: a floating-point tensor or array ``[n, pos, d]`` or ``[n, d]`` is used unchanged.

Rows in a file, a dataset or an iterable are read by a background thread, ahead of the step that needs them
(``tl_vpd.training.data.prefetch``). In a run on many processes each reads its rows of every batch; from an iterable it reads all
rows and keeps its part.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor

from tl_vpd.training.data.datasets import DatasetRows, is_dataset, token_column, tokenised
from tl_vpd.training.data.mapped_rows import MappedRows, mapping_of
from tl_vpd.training.data.protocol import EVERY_ROW, Batches, RowsOfBatches
from tl_vpd.training.data.stream_batches import StreamBatches
from tl_vpd.training.data.token_batches import TokenBatches, holds_vectors

ProcessBatches = TokenBatches | StreamBatches | RowsOfBatches
"""A process's rows of the batches of a run."""


def batches_of(
    data: Any,
    batch_size: int,
    seed: int,
    *,
    tokenizer: Any = None,
    context: int | None = None,
    row_slice: slice = EVERY_ROW,
) -> ProcessBatches:
    """Batches of any data of the table above.

    Args:
        data: what holds rows of tokens.
        batch_size: rows in a batch, over all processes.
        seed: of the order.
        tokenizer: for datasets of text.
        context: length of the rows that datasets of text are cut into.
        row_slice: which of each batch's rows this process needs.

    Raises:
        TypeError: the data is not iterable.
        ValueError: it does not hold rows of tokens, or too few.
    """
    if isinstance(data, Batches):
        if data.batch_size != batch_size:
            raise ValueError(
                f"The data gives batches of {data.batch_size} rows and batch_size is {batch_size}: give both the same number."
            )
        return RowsOfBatches(data, row_slice)
    if isinstance(data, Tensor | np.ndarray):
        return TokenBatches(_rows(data), batch_size, seed, row_slice=row_slice)
    if is_dataset(data):
        if (column := token_column(data)) is None:
            data, column = tokenised(data, tokenizer, context), "tokens"
        if hasattr(data, "__len__"):
            return TokenBatches(DatasetRows(data, column), batch_size, seed, row_slice=row_slice)
    elif not isinstance(data, Iterable):
        raise TypeError(f"The data is a {type(data).__name__}: pass tokens [n, pos], strings, rows or a dataset.")
    return StreamBatches(data, batch_size, row_slice=row_slice)


def _rows(data: Tensor | np.ndarray) -> Tensor | np.ndarray | MappedRows:
    """A tensor or array of rows, after a look at its type and shape."""
    kind = str(data.dtype).removeprefix("torch.")
    # NumPy has no bfloat16; other libraries' types count as none of its kinds.
    numbers = (
        data.dtype.kind in "iuf" if isinstance(data, np.ndarray) else kind.startswith(("int", "uint", "float", "bf"))
    )
    if not numbers:
        raise ValueError(
            f"The data is {kind} of shape {tuple(data.shape)}: give tokens as integers [n, pos], or vectors in a floating-point "
            "type (bfloat16 as a tensor)."
        )
    if data.ndim != 2 and not (data.ndim == 3 and holds_vectors(data)):
        raise ValueError(f"Tokens are of shape {tuple(data.shape)}; rows [n, pos] are needed.")
    if isinstance(data, np.ndarray) and (mapping := mapping_of(data)) is not None:
        return MappedRows(data, mapping)
    return data
