"""Contexts of an attached model that act on the calls of the model inside them, and warn where they are never entered."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Generic, TypeVar

from tl_vpd.adapters.changes import Change, Later

A = TypeVar("A")


class Inside(Change[A], Generic[A]):
    """What ``masked``, ``keep_only``, ``ablated`` and ``edited`` give: a context, which acts on the calls of the model inside it.

    Args:
        attached: what ``with`` gives.
        make: begins it.
        method: that gives this, for a warning if it is never entered.
    """

    def __init__(self, attached: A, make: Callable[[Later], None], method: str) -> None:
        def begin(undo: Later) -> A:
            make(undo)
            return attached

        super().__init__(begin)
        self._method, self._entered = method, False

    def __enter__(self) -> A:
        if self._undos:
            raise RuntimeError(
                f"This {self._method}(...) is entered already: call {self._method} again for each block."
            )
        self._entered = True
        return super().__enter__()

    def __del__(self) -> None:
        if not self._entered and not sys.is_finalizing():
            warnings.warn(
                f"attached.{self._method}(...) without `with` does nothing: write `with attached.{self._method}(...):` and call "
                "the model inside.",
                RuntimeWarning,
                stacklevel=2,
            )
        super().__del__()
