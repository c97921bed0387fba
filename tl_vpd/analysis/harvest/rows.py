"""The rows of a harvest, batch by batch: prompts in memory, or any stream of rows of tokens.

==============================  =======================================================================================
prompts                         are
==============================  =======================================================================================
strings, a tensor, lists, an    read as every function reads prompts; padding is left out
array in memory
a memory-mapped array           read a few rows at a time
any other iterable of rows      read once, in order; a dataset of Hugging Face has them in ``tokens`` or ``input_ids``
==============================  =======================================================================================

Rows of a stream are whole: they are of one length, and each of their tokens counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_vpd.adapters import Adapter
from tl_vpd.training.data.mapped_rows import MappedRows, mapping_of
from tl_vpd.training.data.stream_batches import row_of

Batch = tuple[Int[Tensor, "row pos"], Bool[Tensor, "row pos"] | None]
"""Tokens, and which of them are real (None: all)."""


class Rows:
    """Rows of tokens for a model.

    Args:
        adapter: of the model.
        prompts: of the table above.
        attention_mask: 0 at padding, of prompts in memory (None: where TransformerLens sees padding).

    Raises:
        TypeError: the prompts are neither text nor rows.
        ValueError: they are not this model's, or an attention mask comes with a stream.
    """

    def __init__(self, adapter: Adapter, prompts: Any, attention_mask: Any) -> None:
        self.adapter = adapter
        self._tokens: Tensor | None = None
        self._mask: Tensor | None = None
        self._stream: Iterator[Tensor] = iter(())
        self._mapped: MappedRows | None = None
        mapping = mapping_of(prompts) if isinstance(prompts, np.ndarray) else None
        if mapping is None and not _is_stream(prompts):
            self._tokens = adapter.tokens(prompts)
            check_are_tokens(self._tokens, "A harvest")
            self._mask = adapter.padding(self._tokens, attention_mask)
            self.first = self._tokens[0]
            return
        if attention_mask is not None:
            raise ValueError("attention_mask does nothing for a stream, whose tokens are all real: leave it out.")
        if mapping is not None:
            self._mapped = MappedRows(prompts, mapping)
        else:
            self._stream = iter(map(row_of, prompts))
        head = list(islice(self._from(0), 1))
        if not head:
            raise ValueError("The prompts are a stream without rows: give rows of tokens.")
        self.first = head[0]
        self._stream = chain(head, self._stream)
        check_are_tokens(adapter.tokens(self.first[None]), "A harvest")

    @property
    def n(self) -> int | None:
        """How many rows (None: it is not known before they are read)."""
        if self._tokens is not None:
            return len(self._tokens)
        return None if self._mapped is None else len(self._mapped)

    @property
    def context(self) -> int:
        """Tokens in a row."""
        return len(self.first)

    def batches(self, skip: int, size: int) -> Iterator[Batch]:
        """Batches of rows.

        Args:
            skip: rows that are left out at the start.
            size: rows in a batch; the last one may have fewer.

        Raises:
            ValueError: a row of a stream is of another length, or not this model's.
        """
        if self._tokens is not None:
            for start in range(skip, len(self._tokens), size):
                batch = slice(start, start + size)
                yield self._tokens[batch], None if self._mask is None else self._mask[batch]
            return
        rows = self._from(skip)
        while stacked := list(islice(rows, size)):
            lengths = {len(row) for row in stacked} - {self.context}
            if lengths:
                raise ValueError(
                    f"A row of the stream has {lengths.pop()} tokens and the first has {self.context}: give rows of one length."
                )
            yield self.adapter.tokens(torch.stack(stacked)), None

    def _from(self, skip: int) -> Iterator[Tensor]:
        if (mapped := self._mapped) is not None:
            return (row_of(mapped[np.array([i])][0]) for i in range(skip, len(mapped)))
        return islice(self._stream, skip, None)


def _is_stream(prompts: Any) -> bool:
    known = str | bytes | list | tuple | Tensor | np.ndarray | Mapping
    return isinstance(prompts, Iterable) and not isinstance(prompts, known)


def check_are_tokens(tokens: Tensor, what: str) -> None:
    """Raises ValueError unless the prompts are rows of tokens, which custom models need not take."""
    if tokens.is_floating_point() or tokens.ndim != 2:
        raise ValueError(f"{what} is made of tokens; this model takes {tokens.dtype} of shape {tuple(tokens.shape)}.")
