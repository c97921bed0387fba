"""What a check says, and how it reads a record: figures that are not defined raise ``NotMeasured``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]
NOT_FINITE = "it is not a finite number"
"""Why a figure was left out of a record that should have one."""
FLOOR = 0.02
"""Share of z below which a distance counts as nothing."""


@dataclass(frozen=True)
class Check:
    """One check: a figure, above (``collapsed``, ``controls`` and ``nulls``: below) which limit it is a fault, a sentence.

    ``value`` and ``limit`` are None where the figure is not defined.
    """

    check: str
    value: float | None
    limit: float | None
    fault: bool
    sentence: str


class NotMeasured(Exception):
    """A figure is not defined; the message is its name."""


def number(value: float | None) -> float:
    """A figure of a record as a float (NaN: not defined)."""
    return float("nan") if value is None else float(value)


def figure(record: Record, *keys: str) -> float:
    """A figure of the record.

    Raises:
        NotMeasured: it is None or not finite.
        ValueError: the record has no such figure.
    """
    value: Any = record
    for key in keys:
        if not isinstance(value, Mapping) or key not in value:
            raise ValueError(f"The record has no {'.'.join(keys)}: give an Evaluation, or its record.")
        value = value[key]
    if value is None or not math.isfinite(value):
        raise NotMeasured(".".join(keys))
    return float(value)


def above(name: str, value: float, limit: float, bad: str, good: str) -> Check:
    fault = value > limit
    return Check(name, value, limit, fault, bad if fault else good)


def floor(record: Record) -> float:
    return FLOOR * figure(record, "kl", "zero")


def unit(record: Record) -> str:
    return "nats" if record.get("output", "kl") == "kl" else "squared error"
