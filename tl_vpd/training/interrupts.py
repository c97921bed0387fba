"""Interrupts that wait for the end of a step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Turns the first Ctrl-C or SIGTERM into a flag, so that a step is never cut in two; the second interrupts at once.

    Signals reach the main thread only: in another one the flag is never set.
    """
    flag, leaving = threading.Event(), threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def set_flag(number: int, frame: Any) -> None:
        if flag.is_set() and not leaving.is_set():
            raise KeyboardInterrupt
        flag.set()

    # Ctrl-C is the first to wait and the last to interrupt again, so that none comes between.
    before = {number: signal.signal(number, set_flag) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        try:
            leaving.set()
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, before[number])
