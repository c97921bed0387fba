"""What all threads that ask one endpoint keep to: its pace, and a budget."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from tl_vpd.analysis.labels.asking import Question


class StoppedError(OSError):
    """No question can be asked any more."""


class FailedError(Exception):
    """One question has no answer."""


class Budget:
    """Counts what is spent.

    Args:
        price: of tokens that are sent and answered.
        limit: of the price (None: there is none).
    """

    def __init__(self, price: Callable[[int, int], float], limit: float | None) -> None:
        self._price, self._limit, self._lock = price, limit, threading.Lock()
        self._spent = self._reserved = 0.0

    def reserve(self, question: Question) -> float:
        """Sets the largest price of a question aside; raises StoppedError if there is less."""
        largest = self._price(question.tokens, question.answer_tokens)
        with self._lock:
            # What was estimated to fit exactly must fit after sums of floats, too.
            if self._limit is not None and self._spent + self._reserved + largest > self._limit * (1 + 1e-9):
                spent = f"{self._spent:.3g} of max_cost={self._limit:g} is spent, and the next answer may cost more than the rest"
                raise StoppedError(f"{spent}: raise max_cost and call again.")
            self._reserved += largest
        return largest

    def settle(self, reserved: float, sent: int, answered: int) -> None:
        """Replaces what was set aside by what it has cost."""
        with self._lock:
            self._reserved -= reserved
            self._spent += self._price(sent, answered)


class Pace:
    """When requests may start.

    Args:
        per_minute: requests (None: as many as there are).
    """

    def __init__(self, per_minute: float | None) -> None:
        self._gap, self._next, self._lock = 60.0 / per_minute if per_minute else 0.0, 0.0, threading.Lock()
        self._stopped = threading.Event()

    def wait(self) -> None:
        """Until a request may start; raises FailedError if none may any more."""
        while True:
            with self._lock:
                rest = self._next - time.monotonic()
                if rest <= 0 and not self._stopped.is_set():
                    self._next = time.monotonic() + self._gap
                    return
            self.sleep(rest)

    def hold(self, seconds: float) -> None:
        """Lets no request start for some time."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)

    def sleep(self, seconds: float) -> None:
        """Waits; raises FailedError if no request may start any more."""
        if self._stopped.wait(max(seconds, 0.0)):
            raise FailedError("it was stopped before it was asked")

    def stop(self) -> None:
        """Lets no request start any more, and ends all waiting."""
        self._stopped.set()
