"""Datasets of Hugging Face: of tokens, or of text that is tokenised."""

from __future__ import annotations

import inspect
import os
from typing import Any

import numpy as np

from tl_vpd.adapters.versions import tokenize_and_concatenate


class DatasetRows:
    """The token rows of a dataset that is not streamed, read row by row from its files."""

    def __init__(self, dataset: Any, column: str) -> None:
        self.dataset, self.column = dataset, column
        self.shape = (len(dataset), len(dataset[0][column]))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return np.stack([np.asarray(row) for row in self.dataset[rows.tolist()][self.column]])


def is_dataset(data: Any) -> bool:
    """Whether an object is a dataset of Hugging Face, streamed or not."""
    return hasattr(data, "features") and hasattr(data, "map")


def token_column(dataset: Any) -> str | None:
    """The column of tokens, if there is one."""
    names = dataset.column_names or list(next(iter(dataset)))
    return next((name for name in ("tokens", "input_ids") if name in names), None)


def tokenised(dataset: Any, tokenizer: Any, context: int | None) -> Any:
    """A dataset of text as one of token rows of length ``context``, by TransformerLens's ``tokenize_and_concatenate``.

    A streamed dataset stays streamed.

    Raises:
        ValueError: there is no tokenizer, length or text, or the installed TransformerLens cannot tokenise streams.
    """
    if tokenizer is None or context is None:
        raise ValueError("The dataset holds text and this model has no tokenizer: pass a dataset of tokens.")
    if "text" not in (names := dataset.column_names or list(next(iter(dataset)))):
        raise ValueError(f"The dataset has {', '.join(names)}; 'tokens', 'input_ids' or 'text' is needed.")
    streaming = not hasattr(dataset, "__len__")
    options: dict[str, Any] = {"num_proc": min(10, os.cpu_count() or 1)}
    if streaming:
        if "set_format" not in inspect.signature(tokenize_and_concatenate).parameters:
            raise ValueError(
                "This TransformerLens cannot tokenise a streamed dataset: update it to 3.x, or pass tokens."
            )
        options = {"set_format": False}
    return tokenize_and_concatenate(
        dataset, tokenizer, streaming=streaming, max_length=context, column_name="text", **options
    )
