"""Token batches in an order that follows from seed and step alone, so that a resumed run sees what it would have seen.

==============================  =======================================================================================
data                            order
==============================  =======================================================================================
tensor or array ``[n, pos]``    each epoch is a fresh permutation of the rows, drawn from (seed, epoch); an array may be
                                memory-mapped (``numpy.load(path, mmap_mode="r")``) and larger than memory: a step reads
                                its own rows
any other iterable of rows      as they come; resuming goes through the rows that were seen. It must start afresh each
                                time it is iterated (a list, a dataset, an object with ``__iter__``; not a generator)
dataset of Hugging Face         of ``tokens`` as above; of text, tokenised by TransformerLens's ``tokenize_and_concatenate``
an object with ``at(step)``     whatever it makes for a step (``Batches``): data without end, such as those of ``tl_vpd.toys``
==============================  =======================================================================================

Models of people's own may take vectors: a floating-point tensor or array ``[n, pos, d]`` or ``[n, d]`` stays as it is.

Rows that have to be fetched (from a file, a dataset or an iterable) are fetched by a thread of their own, ahead of the step that
needs them (``tl_vpd.training.data.prefetch``). Of a run on many processes each reads its own rows of every batch; of an iterable it
goes through all rows and keeps its own.
"""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import count, islice
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from tl_vpd.adapters.versions import tokenize_and_concatenate
from tl_vpd.training.data.prefetch import Ahead

ALL = slice(None)
SAMPLE = 256
"""Rows that are looked at before a run, where all are too many to read."""


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
        """The batch of a step; steps are asked for in order."""

    def describe(self) -> dict[str, Any]:
        """What tells these rows from others, for resuming."""

    def close(self) -> None:
        """Ends what runs in the background."""


class TokenBatches:
    """Batches of rows of a tensor or array of tokens ``[n, pos]`` or vectors ``[n, pos, d]`` or ``[n, d]``; a batch that would
    reach past an epoch's end starts the next one.

    Args:
        own: which of a batch's rows are wanted here.

    Raises:
        ValueError: there are fewer rows than a batch takes.
    """

    def __init__(
        self,
        tokens: Shaped[Tensor, "n _ ..."] | np.ndarray | DatasetRows,
        batch_size: int,
        seed: int,
        *,
        own: slice = ALL,
    ) -> None:
        if len(tokens) < batch_size:
            raise ValueError(f"There are {len(tokens)} rows of tokens and batch_size is {batch_size}: give more rows.")
        tokens = tokens.detach() if isinstance(tokens, Tensor) else tokens
        self.tokens, self.batch_size, self.seed, self.own = tokens, batch_size, seed, own
        self.context = 1 if _holds_vectors(tokens) and len(tokens.shape) == 2 else int(tokens.shape[1])
        self.per_epoch = len(tokens) // batch_size
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.long)
        in_memory = isinstance(tokens, Tensor) or (isinstance(tokens, np.ndarray) and not isinstance(tokens, np.memmap))
        self._ahead = None if in_memory else Ahead(lambda step: map(self._read, count(step)))

    def at(self, step: int) -> Shaped[Tensor, "batch _ ..."]:
        """The batch of a step."""
        return self._read(step) if self._ahead is None else self._ahead.at(step)

    def _read(self, step: int) -> Tensor:
        epoch, index = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            # A large odd multiplier keeps the streams of different seeds apart.
            generator = torch.Generator().manual_seed(_in_64_bits(self.seed * 1_000_003 + epoch))
            self._order = torch.randperm(len(self.tokens), generator=generator)
            self._epoch = epoch
        return self._rows(self._order[index * self.batch_size : (index + 1) * self.batch_size][self.own])

    def _rows(self, rows: Int[Tensor, " some"]) -> Tensor:
        if isinstance(self.tokens, Tensor):
            found = self.tokens[rows.to(self.tokens.device)]
            return found if found.is_floating_point() else found.long()
        if _holds_vectors(self.tokens):
            return torch.from_numpy(np.array(self.tokens[rows.numpy()]))
        return torch.from_numpy(np.asarray(self.tokens[rows.numpy()]).astype(np.int64))

    def sample(self) -> Shaped[Tensor, "some _ ..."]:
        """Rows from all over the data: all of a tensor's, else a few."""
        n = len(self.tokens)
        return self._rows(torch.arange(n) if isinstance(self.tokens, Tensor) else torch.from_numpy(_spread(n)))

    def describe(self) -> dict[str, Any]:
        """Rows, context, a checksum of a sample of rows, and, where they are in memory, one of them all."""
        rows = self.tokens
        if isinstance(rows, Tensor):
            rows = (rows.view(torch.int16) if rows.dtype == torch.bfloat16 else rows).cpu().numpy()
        found = {"rows": len(rows), "context": self.context, "sha256_of_sample": _digest(rows[_spread(len(rows))])}
        if isinstance(rows, np.ndarray) and not isinstance(rows, np.memmap):
            found["sha256"] = _digest(rows)
        return found

    def close(self) -> None:
        """Ends the thread, if there is one."""
        if self._ahead is not None:
            self._ahead.close()


def _digest(rows: np.ndarray) -> str:
    """A checksum; the same tokens in another width are the same tokens."""
    rows = rows.astype(np.int64) if np.issubdtype(rows.dtype, np.integer) else rows
    return hashlib.sha256(np.ascontiguousarray(rows).tobytes()).hexdigest()


def _in_64_bits(seed: int) -> int:
    """A seed that PyTorch takes: itself, where it does."""
    return seed if -(1 << 63) <= seed < 1 << 63 else seed % (1 << 63)


def _spread(n: int) -> np.ndarray:
    return np.linspace(0, n - 1, min(n, SAMPLE)).astype(int)


def _holds_vectors(rows: Tensor | np.ndarray | DatasetRows) -> bool:
    """Whether rows are floating-point vectors and no tokens."""
    if isinstance(rows, Tensor):
        return rows.is_floating_point()
    return isinstance(rows, np.ndarray) and np.issubdtype(rows.dtype, np.floating)


class StreamBatches:
    """Batches of the rows of an iterable, fetched ahead by a thread; it starts again when it is at its end.

    Raises:
        ValueError: it has no rows, a row is shorter than the first, or it cannot be iterated twice.
    """

    def __init__(self, rows: Iterable[Any], batch_size: int, *, own: slice = ALL) -> None:
        if iter(rows) is rows:
            raise ValueError(
                "The data can be gone through only once, so a run could not resume: pass a list or a dataset."
            )
        self.rows, self.batch_size, self.own = rows, batch_size, own
        first = next(iter(rows), None)
        if first is None:
            raise ValueError("The data has no rows.")
        self._first = _row(first)
        self.context = len(self._first)
        self._ahead = Ahead(self._batches)

    def at(self, step: int) -> Int[Tensor, "batch pos"]:
        """The batch of a step; the first may be any, and each later one follows the one before."""
        return self._ahead.at(step)

    def sample(self) -> Int[Tensor, "1 pos"]:
        """The first row."""
        return self._first[None]

    def describe(self) -> dict[str, Any]:
        """The context and a checksum of the first row; what follows cannot be known without reading it."""
        digest = hashlib.sha256(self._first.numpy().tobytes()).hexdigest()
        return {"rows": "a stream", "context": self.context, "sha256": digest}

    def close(self) -> None:
        """Ends the thread."""
        self._ahead.close()

    def _endless(self, skip: int) -> Iterator[Tensor]:
        """The rows, again and again, without the first ``skip``."""
        if skip and hasattr(self.rows, "skip"):
            found = False
            for row in self.rows.skip(skip):
                found = True
                yield _row(row)
            skip = 0 if found else skip
        while True:
            n = 0
            for n, row in enumerate(self.rows, start=1):
                if n > skip:
                    yield _row(row)
            if not n:
                raise ValueError("The data has no rows.")
            skip = max(0, skip - n)

    def _batches(self, step: int) -> Iterator[Tensor]:
        rows = self._endless(step * self.batch_size)
        while True:
            batch = list(islice(rows, self.batch_size))
            if any(len(row) < self.context for row in batch):
                raise ValueError(f"A row of the data has fewer tokens than the first ({self.context}).")
            yield torch.stack([row[: self.context] for row in batch[self.own]])


class OwnRows:
    """Some of the rows of batches that somebody else makes."""

    def __init__(self, batches: Batches, own: slice) -> None:
        self.batches, self.own = batches, own
        self.context, self.batch_size = batches.context, batches.batch_size

    def at(self, step: int) -> Shaped[Tensor, "own ..."]:
        """The rows of a step."""
        return self.batches.at(step)[self.own]

    def sample(self) -> Shaped[Tensor, "own ..."]:
        """Those of the first step."""
        return self.at(0)

    def describe(self) -> dict[str, Any]:
        """As the whole batches say it."""
        return self.batches.describe()

    def close(self) -> None:
        """Ends what runs in the background."""
        self.batches.close()


def _row(row: Any) -> Tensor:
    """A row as int64 tokens: a tensor, an array, a list, or a mapping with ``tokens`` or ``input_ids``."""
    if isinstance(row, str):
        raise ValueError(
            "A row is a text: pass a list of strings, or a split of the dataset, such as dataset['train']."
        )
    if isinstance(row, Mapping):
        key = "tokens" if "tokens" in row else "input_ids"
        if key not in row:
            raise ValueError(f"A row has {', '.join(row)}; 'tokens' or 'input_ids' is needed.")
        row = row[key]
    tokens = torch.as_tensor(np.asarray(row) if not isinstance(row, Tensor) else row)
    if tokens.ndim != 1 or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise ValueError(f"A row is {tokens.dtype} of shape {tuple(tokens.shape)}; integers [pos] are needed.")
    return tokens.long()


class DatasetRows:
    """The token rows of a Hugging Face dataset that is not streamed, read row by row from its own files."""

    def __init__(self, dataset: Any, column: str) -> None:
        self.dataset, self.column = dataset, column
        self.shape = (len(dataset), len(dataset[0][column]))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return np.stack([np.asarray(row) for row in self.dataset[rows.tolist()][self.column]])


ProcessBatches = TokenBatches | StreamBatches | OwnRows
"""A process's rows of the batches of a run."""


def batches_of(
    data: Any, batch_size: int, seed: int, *, tokenizer: Any = None, context: int | None = None, own: slice = ALL
) -> ProcessBatches:
    """Batches of whatever holds rows of tokens; see the table above.

    Args:
        tokenizer, context: for datasets of text. own: which of each batch's rows are wanted here.

    Raises:
        TypeError: the data is nothing to go through. ValueError: it does not hold rows of tokens, or too few.
    """
    if isinstance(data, Batches):
        if data.batch_size != batch_size:
            raise ValueError(
                f"The data gives batches of {data.batch_size} rows and batch_size is {batch_size}: set either."
            )
        return OwnRows(data, own)
    if isinstance(data, Tensor | np.ndarray):
        if data.ndim != 2 and not (data.ndim == 3 and _holds_vectors(data)):
            raise ValueError(f"Tokens are of shape {tuple(data.shape)}; rows [n, pos] are needed.")
        return TokenBatches(data, batch_size, seed, own=own)
    if hasattr(data, "features") and hasattr(data, "map"):
        column = _token_column(data)
        if column is None:
            if tokenizer is None or context is None:
                raise ValueError("The dataset holds text and this model has no tokenizer: pass a dataset of tokens.")
            if "text" not in (names := data.column_names or list(next(iter(data)))):
                raise ValueError(f"The dataset has {', '.join(names)}; 'tokens', 'input_ids' or 'text' is needed.")
            data = tokenised(data, tokenizer, context)
            column = "tokens"
        return (
            TokenBatches(DatasetRows(data, column), batch_size, seed, own=own)
            if hasattr(data, "__len__")
            else StreamBatches(data, batch_size, own=own)
        )
    if not isinstance(data, Iterable):
        raise TypeError(f"The data is a {type(data).__name__}: pass tokens [n, pos], strings, rows or a dataset.")
    return StreamBatches(data, batch_size, own=own)


def _token_column(dataset: Any) -> str | None:
    names = dataset.column_names or list(next(iter(dataset)))
    return next((name for name in ("tokens", "input_ids") if name in names), None)


def tokenised(dataset: Any, tokenizer: Any, context: int, *, column: str = "text") -> Any:
    """A Hugging Face dataset of text as one of token rows of ``context``, by TransformerLens's ``tokenize_and_concatenate``.

    A streamed dataset stays streamed.

    Raises:
        ValueError: the installed TransformerLens cannot tokenise streams.
    """
    streaming = not hasattr(dataset, "__len__")
    options: dict[str, Any] = {"num_proc": min(10, os.cpu_count() or 1)}
    if streaming:
        if "set_format" not in inspect.signature(tokenize_and_concatenate).parameters:
            raise ValueError(
                "This TransformerLens cannot tokenise a streamed dataset: update it to 3.x, or pass tokens."
            )
        options = {"set_format": False}
    return tokenize_and_concatenate(
        dataset, tokenizer, streaming=streaming, max_length=context, column_name=column, **options
    )
