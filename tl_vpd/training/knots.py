"""Values that change over a run, piecewise linear in the fraction of it that is done.

>>> at(((0.0, 2.0), (0.5, 2.0), (1.0, 1.0)), step=75, steps=100)
1.5
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field


def _constant(value: Any) -> Any:
    """A number stands for itself over the whole run."""
    return ((0.0, value),) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _rising(knots: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
    if any(first >= second for (first, _), (second, _) in pairwise(knots)):
        raise ValueError("the fractions of the run must rise from knot to knot.")
    return knots


Knots = Annotated[
    tuple[tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0)]], ...],
    Field(min_length=1),
    BeforeValidator(_constant),
    AfterValidator(_rising),
]
"""Pairs of a fraction of the run and the value there: linear between them, constant before the first and after the last. A number
stands for itself over the whole run."""


def at(knots: tuple[tuple[float, float], ...], step: int, steps: int) -> float:
    """The value at a step.

    Args:
        knots: fractions of the run, and values.
        step: the number of the step, from 0.
        steps: of the run.
    """
    for (x0, v0), (x1, v1) in pairwise(knots):
        start, end = x0 * steps, x1 * steps
        if step < end:
            return v0 + (v1 - v0) * (max(step - start, 0.0) / (end - start))
    return knots[-1][1]
