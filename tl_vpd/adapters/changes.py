"""Changes of a model that are undone on leaving, whatever interrupts them.

    >>> @change
    ... def doubled(undo, numbers):
    ...     undo(partial(numbers.__setitem__, slice(None), list(numbers)))      # how to undo a step, before it is made
    ...     numbers[:] = [2 * n for n in numbers]
    >>> numbers = [1, 2]
    >>> with doubled(numbers):
    ...     numbers
    [2, 4]
    >>> numbers
    [1, 2]

Ctrl-C waits while a change is made or undone. An exception that arises there all the same (another thread can raise one) undoes
what has been made; what it keeps from being undone is undone when the change is garbage collected, which is as soon as the
exception's traceback is dropped.
"""

from __future__ import annotations

import functools
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")
Undo = Callable[[], Any]
"""Undoes one step; carrying it out twice is the same as once."""
Later = Callable[[Undo], None]
"""Notes how to undo a step. Steps are undone in reverse order."""


class Uninterrupted:
    """Inside, Ctrl-C (SIGINT, in the main thread) waits; it is handled on leaving. A second one is handled at once."""

    def __init__(self) -> None:
        self._before: Callable[..., Any] | None = None
        self._came: tuple[Any, ...] | None = None

    def __enter__(self) -> Uninterrupted:
        if threading.current_thread() is threading.main_thread():
            handler = signal.getsignal(signal.SIGINT)
            if callable(handler) and not isinstance(getattr(handler, "__self__", None), Uninterrupted):
                self._before = handler
                signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, *signal_and_frame: Any) -> None:
        if self._came is not None and self._before is not None:
            self._before(*signal_and_frame)
        self._came = signal_and_frame

    def __exit__(self, *exception: Any) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            if self._came is not None:
                self._before(*self._came)


def interrupt_waits() -> bool:
    """Whether a Ctrl-C waits for the end of an ``Uninterrupted`` section."""
    section = getattr(signal.getsignal(signal.SIGINT), "__self__", None)
    return isinstance(section, Uninterrupted) and section._came is not None


class Change(AbstractContextManager[T], Generic[T]):
    """Something changed while a context lasts.

    ``make`` gets a function that notes how to undo each step, before it is made. A ``lasting`` change stays when this object is
    garbage collected.
    """

    def __init__(self, make: Callable[[Later], T], *, lasting: bool = False) -> None:
        self._undos: list[Undo] = []
        self._make, self._lasting = make, lasting

    def __enter__(self) -> T:
        try:
            with Uninterrupted():
                return self._make(self._undos.append)
        except BaseException:
            self.undo()
            raise

    def __exit__(self, *exception: Any) -> None:
        self.undo()

    def undo(self) -> None:
        """Undoes what has been made and not undone yet."""
        if self._undos:
            with Uninterrupted():
                while self._undos:
                    self._undos[-1]()
                    self._undos.pop()

    def __del__(self) -> None:
        if self._undos and not self._lasting and not sys.is_finalizing():
            self.undo()


def change(make: Callable[Concatenate[Later, P], T]) -> Callable[P, Change[T]]:
    """Makes a context manager of a function that makes a change; its first argument is called as in ``Change``."""

    @functools.wraps(make)
    def context(*arguments: P.args, **keywords: P.kwargs) -> Change[T]:
        return Change(lambda undo: make(undo, *arguments, **keywords))

    return context


def enter(undo: Later, inner: AbstractContextManager[T]) -> T:
    """Makes another context a step of a change; leaving it twice must be the same as once."""
    undo(partial(inner.__exit__, None, None, None))
    return inner.__enter__()


def put_attribute(undo: Later, owner: Any, name: str, value: Any) -> None:
    """Sets an attribute in an instance's ``__dict__``; undoing restores it, unless somebody has replaced it since."""
    attributes = owner.__dict__
    missing = name not in attributes
    before = attributes.get(name)

    def restore() -> None:
        if attributes.get(name) is value:
            if missing:
                del attributes[name]
            else:
                attributes[name] = before

    undo(restore)
    attributes[name] = value
