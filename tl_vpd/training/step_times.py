"""How long steps take: what the bar's estimate is made from, and whether other processes disturb them."""

from __future__ import annotations

import statistics
from collections import deque

RECENT = 30
"""Steps that are looked at."""
DISTURBED = 4.0
"""How many times as long as the fastest one disturbed steps take. Steps of a quiet machine are within a factor of two."""
PART = 1 / 3
"""The part of the recent steps that must be disturbed."""


class StepTimes:
    """The seconds of recent steps.

    >>> times = StepTimes()
    >>> for seconds in (1.0, 1.1, 9.0):
    ...     times.add(seconds)
    >>> times.median, times.disturbed
    (1.1, False)
    """

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=RECENT)
        self.fastest = float("inf")

    def add(self, seconds: float) -> None:
        """Notes a step."""
        self._recent.append(seconds)
        self.fastest = min(self.fastest, seconds)

    @property
    def median(self) -> float:
        """Of the recent steps: one that wrote a state, or waited for a compiler, does not count."""
        return statistics.median(self._recent)

    @property
    def slowest(self) -> float:
        """Of the recent steps."""
        return max(self._recent)

    @property
    def disturbed(self) -> bool:
        """Whether a third of ``RECENT`` steps took four times as long as the fastest step so far."""
        slow = sum(seconds >= DISTURBED * self.fastest for seconds in self._recent)
        return len(self._recent) == RECENT and slow >= PART * RECENT
