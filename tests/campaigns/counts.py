"""How often each outcome of a campaign came, and how long a campaign may try."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

FAILURES = ("silent", "wrong exception", "left behind", "hung", "crashed")
"""Outcomes that must never occur: another result without a word; an error that is not one sentence of this package's about what
came; something that stays on a model or a disk; no end; the death of the process."""

EXAMPLES = 20
"""So many failures of each kind are reported with how to do them again."""


@dataclass
class Counts:
    """Outcomes of a campaign's tries.

    Args:
        outcomes: how often each came.
        examples: of failures by outcome: how to do them again.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, outcome: str, example: str = "", times: int = 1) -> None:
        """Counts a try.

        Args:
            outcome: a short plain word; those in ``FAILURES`` fail the campaign.
            example: how to do it again; stored for the first failures of each kind.
            times: for tries that are counted together.
        """
        self.outcomes[outcome] += times
        stored = self.examples.setdefault(outcome, []) if outcome in FAILURES else []
        if len(stored) < EXAMPLES:
            stored.append(example)

    def add_error(self, error: Exception, what: str) -> None:
        """Counts what reading a damaged file has raised: a refusal is one sentence.

        Args:
            error: that was raised.
            what: was done, for a failure's example.
        """
        text = str(error)
        sentence = "\n" not in text and text.endswith(".") and len(text) < 1_000
        refusal = isinstance(error, ValueError | OSError) and sentence
        self.add("refused" if refusal else "wrong exception", f"{what}: {type(error).__name__}: {text[:300]}")

    def merge(self, other: Counts) -> None:
        """Adds another's tries."""
        self.outcomes.update(other.outcomes)
        for outcome, examples in other.examples.items():
            self.examples[outcome] = (self.examples.get(outcome, []) + examples)[:EXAMPLES]

    @property
    def tries(self) -> int:
        """How often something was tried."""
        return self.outcomes.total()

    @property
    def failures(self) -> int:
        """How many tries failed."""
        return sum(self.outcomes[outcome] for outcome in FAILURES)

    def report(self) -> str:
        """Counts, and the examples of failures, for a person."""
        lines = [f"{self.tries} tries: {self.summary()}"]
        lines += [f"{outcome}: {example}" for outcome, examples in self.examples.items() for example in examples]
        return "\n".join(lines)

    def summary(self) -> str:
        """The counts on one line, the most frequent first; ``silent`` is always there."""
        shown = dict(self.outcomes.most_common())
        return ", ".join(f"{outcome} {n}" for outcome, n in ({**shown, "silent": self.outcomes["silent"]}).items())

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"outcomes": dict(self.outcomes), "examples": self.examples}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Counts:
        """Of ``as_dict``."""
        return cls(Counter(data["outcomes"]), {k: list(v) for k, v in data["examples"].items()})


@dataclass(frozen=True)
class Budget:
    """How much a campaign tries.

    Args:
        tries: at most.
        seconds: at most; no new try begins after them.
    """

    tries: int
    seconds: float

    def tries_left(self) -> Iterator[int]:
        """0, 1, 2 … until the tries or the seconds are over. At least one try is made."""
        end = time.monotonic() + self.seconds
        for i in range(self.tries):
            if i and time.monotonic() > end:
                return
            yield i

    def part(self, fraction: float) -> Budget:
        """A fraction of the budget, for a campaign of several sorts of tries."""
        return Budget(max(1, round(self.tries * fraction)), self.seconds * fraction)
