"""How results print: their fields with shapes in place of numbers, so that a cell of a notebook stays readable.

>>> from dataclasses import dataclass
>>> import torch
>>> @dataclass(frozen=True)
... class Scores(Printed):
...     layer: int
...     values: torch.Tensor
...     names: tuple[str, ...]
>>> Scores(1, torch.zeros(2, 40), tuple("abcdefgh"))
Scores(layer=1, values=float32[2, 40], names=('a', 'b', 'c', … 8 in all))
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor, nn

LINE, FEW, LONG = 110, 3, 70
"""Characters above which each field gets a line; entries shown of a long collection; characters of one value."""


class Printed:
    """A base for dataclasses: private fields are left out, and tensors and tables print as their type and shape."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "__repr__" not in vars(cls):  # where a class has one of its own, @dataclass makes none
            cls.__repr__ = Printed.__repr__  # type: ignore[method-assign]

    def __repr__(self) -> str:
        shown = [f"{f.name}={short(getattr(self, f.name))}" for f in fields(self) if f.name[0] != "_"]  # type: ignore[arg-type]
        name, line = type(self).__name__, ", ".join(shown)
        return f"{name}({line})" if len(line) <= LINE else "\n  ".join([f"{name}(", *shown]) + "\n)"


def short(value: Any) -> str:
    """A value in a few words.

    Args:
        value: anything.
    """
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0:
        return str(value.item())
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, pd.DataFrame):
        return f"DataFrame[{len(value)} rows: {_entries(map(str, value.columns), len(value.columns))}]"
    if isinstance(value, Mapping):
        return f"{{{_entries((f'{key!r}: {short(entry)}' for key, entry in value.items()), len(value))}}}"
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        left, right = ("(", ")") if isinstance(value, tuple) else ("[", "]")
        return f"{left}{_entries(map(short, value), len(value))}{',' if left == '(' and len(value) == 1 else ''}{right}"
    text = repr(value)
    if len(text) <= LONG and "\n" not in text:
        return text
    named = isinstance(value, nn.Module) or (is_dataclass(value) and not isinstance(value, type))
    return f"{type(value).__name__}(…)" if named else f"{' '.join(text.split())[:LONG]}…"


def _entries(texts: Iterable[str], count: int) -> str:
    few = [text for _, text in zip(range(count if count <= FEW + 1 else FEW), texts, strict=False)]
    return ", ".join(few) if len(few) == count else f"{', '.join(few)}, … {count} in all"
