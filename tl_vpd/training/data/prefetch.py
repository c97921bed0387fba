"""Batches made by a thread, ahead of the steps that need them, so that reading and tokenising take no time of a step's.

>>> import torch
>>> ahead = Ahead(lambda step: (torch.full((2, 3), i) for i in range(step, 100)))
>>> int(ahead.at(5)[0, 0]), int(ahead.at(6)[0, 0])
(5, 6)
>>> ahead.close()
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

AHEAD = 4
"""Batches that are fetched before they are asked for."""
Make = Callable[[int], Iterator[Tensor]]
"""The batches from a step on, without end."""


class Ahead:
    """Batches of steps that follow one another; any other step starts afresh there."""

    def __init__(self, make: Make) -> None:
        self._make = make
        self._next: int | None = None
        self._queue: queue.Queue[Tensor | BaseException] = queue.Queue(AHEAD)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def at(self, step: int) -> Tensor:
        """The batch of a step; an error while it was made is raised here."""
        if self._next != step:
            self.close()
            self._start(step)
        found = self._queue.get()
        if isinstance(found, BaseException):
            raise found
        self._next = step + 1
        return found

    def close(self) -> None:
        """Ends the thread."""
        self._stop.set()
        if self._thread is not None:
            while self._thread.is_alive():
                _drain(self._queue)
                self._thread.join(timeout=0.05)
        self._thread, self._next = None, None

    def _start(self, step: int) -> None:
        self._stop, self._queue = threading.Event(), queue.Queue(AHEAD)
        arguments = (self._make, step, self._queue, self._stop)
        self._thread = threading.Thread(target=_fetch, args=arguments, daemon=True)
        self._thread.start()


def _fetch(make: Make, step: int, out: queue.Queue[Tensor | BaseException], stop: threading.Event) -> None:
    try:
        for batch in make(step):
            while not stop.is_set():
                try:
                    out.put(batch, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if stop.is_set():
                return
    except BaseException as error:  # it is raised where the batch is asked for
        out.put(error)


def _drain(filled: queue.Queue[Any]) -> None:
    try:
        while True:
            filled.get_nowait()
    except queue.Empty:
        pass
