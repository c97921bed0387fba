"""Threads that use one model take turns: a pass on the package's behalf, or of an attached model, is never two at once.

A thread that finds the model in use waits, for at most ``WAIT`` seconds, and is then refused: the other may be waiting for it.
"""

from __future__ import annotations

import functools
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from tl_vpd.adapters.changes import Later, change, interrupt_waits, put_attribute
from tl_vpd.adapters.taps import OnModel, is_ours

WAIT = 60.0
"""Seconds."""
METHODS = ("forward", "hooks", "run_with_hooks", "run_with_cache", "add_hook", "reset_hooks")
"""What other threads may call of a model while this package's taps are on it."""


class Turns:
    """Whose turn it is to use a model: the thread's whose uses have begun and not ended.

    Attributes:
        owner: that thread (None: nobody uses the model).
        uses: by that thread.
    """

    def __init__(self) -> None:
        # A change that is garbage collected in the middle of these methods ends its use in them.
        self._guard = threading.RLock()
        self.owner: threading.Thread | None = None
        self.uses: set[object] = set()

    def begin(self, use: object, *, wait: float | None = None) -> None:
        """Waits for this thread's turn.

        Args:
            use: any object; ``end`` it in ``finally``, also where this raises.
            wait: for so many seconds (None: ``WAIT``).

        Raises:
            RuntimeError: another thread has used the model for the whole time.
        """
        if in_backward():
            return
        me = threading.current_thread()
        started, limit = time.monotonic(), WAIT if wait is None else wait
        while not self._begun(me, use):
            waited = time.monotonic() - started
            if interrupt_waits():
                raise KeyboardInterrupt
            if waited > limit:
                name = getattr(self.owner, "name", "another")
                raise RuntimeError(
                    f"Thread {me.name!r} has waited {limit:g} seconds for this model, which thread {name!r} is using: let that "
                    "end first, or give each thread a copy of the model."
                )
            time.sleep(min(0.01, max(1e-4, waited / 10)))

    def _begun(self, me: threading.Thread, use: object) -> bool:
        with self._guard:
            if self.owner is None or not self.owner.is_alive():
                self.owner, self.uses = me, set()
            if self.owner is me:
                self.uses.add(use)
            return self.owner is me

    def end(self, use: object) -> None:
        """Ends a use; nothing, if it has ended or never begun."""
        with self._guard:
            self.uses.discard(use)
            if not self.uses:
                self.owner = None

    def only(self, use: object) -> bool:
        """Whether a use that has begun is the only one."""
        return self.uses == {use}


def in_backward() -> bool:
    """Whether this runs inside a backward pass: a GPU's runs in other threads, for the one that waits for it."""
    return torch._C._current_graph_task_id() != -1


_turns: weakref.WeakKeyDictionary[nn.Module, Turns] = weakref.WeakKeyDictionary()


def turns_of(model: nn.Module) -> Turns:
    """The turns at a model; raises TypeError if it is not a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"The model is a {type(model).__name__}: give a HookedTransformer or a TransformerBridge.")
    turns = _turns.get(model)
    return _turns.setdefault(model, Turns()) if turns is None else turns


@change
def turn(undo: Later, model: nn.Module, wait: float | None = None) -> None:
    """Inside, it is this thread's turn to use the model.

    Args:
        undo: notes how to end it.
        model: which.
        wait: as in ``begin``.
    """
    turns, use = turns_of(model), object()
    undo(partial(turns.end, use))
    turns.begin(use, wait=wait)


@change
def others_wait(undo: Later, model: nn.Module) -> None:
    """Inside, other threads that call the model wait until it is their turn."""
    for method in METHODS:
        if not is_ours(model.__dict__.get(method)):
            put_attribute(undo, model, method, Waiting(turns_of(model), getattr(model, method)))


class Waiting(OnModel):
    """A model's method, which threads call in their turn.

    Args:
        turns: at the model.
        plain: the method.
    """

    def __init__(self, turns: Turns, plain: Callable[..., Any]) -> None:
        self.turns, self.plain = turns, plain
        functools.update_wrapper(self, plain)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """The method's result."""
        use = object()
        try:
            self.turns.begin(use)
            return self.plain(*arguments, **keywords)
        finally:
            self.turns.end(use)
