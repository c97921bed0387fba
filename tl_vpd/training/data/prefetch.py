"""Batches made by a thread ahead of the steps that need them, so that reading and tokenising take no time of a step.

>>> import torch
>>> prefetcher = Prefetcher(lambda step: (torch.full((2, 3), i) for i in range(step, 100)))
>>> int(prefetcher.at(5)[0, 0]), int(prefetcher.at(6)[0, 0])
(5, 6)
>>> prefetcher.close()
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

DEPTH = 4
"""Batches that are made before they are needed."""
BatchesFrom = Callable[[int], Iterator[Tensor]]
"""The batches from a step on; the iterator never ends."""


class Prefetcher:
    """Batches of consecutive steps; any other step starts again there."""

    def __init__(self, batches_from: BatchesFrom) -> None:
        self._batches_from = batches_from
        self._next: int | None = None
        self._queue: queue.Queue[Tensor | BaseException] = queue.Queue(DEPTH)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def at(self, step: int) -> Tensor:
        """The batch of a step; an error of the thread is raised by the step that needs the batch."""
        if self._next != step:
            self.close()
            self._start(step)
        batch = self._queue.get()
        if isinstance(batch, BaseException):
            self.close()  # the thread has ended: the next step starts another
            raise batch
        self._next = step + 1
        return batch

    def close(self) -> None:
        """Ends the thread."""
        self._stop.set()
        if self._thread is not None:
            while self._thread.is_alive():
                _drain(self._queue)
                self._thread.join(timeout=0.05)
        self._thread, self._next = None, None

    def _start(self, step: int) -> None:
        self._stop, self._queue = threading.Event(), queue.Queue(DEPTH)
        arguments = (self._batches_from, step, self._queue, self._stop)
        self._thread = threading.Thread(target=_fill, args=arguments, daemon=True)
        self._thread.start()


def _fill(
    batches_from: BatchesFrom, step: int, out: queue.Queue[Tensor | BaseException], stop: threading.Event
) -> None:
    try:
        for batch in batches_from(step):
            while not stop.is_set():
                try:
                    out.put(batch, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if stop.is_set():
                return
    except BaseException as error:
        out.put(error)


def _drain(filled: queue.Queue[Any]) -> None:
    try:
        while True:
            filled.get_nowait()
    except queue.Empty:
        pass
