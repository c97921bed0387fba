"""Checks of the configs and numbers that functions take."""

from __future__ import annotations

from typing import Any, TypeVar

C = TypeVar("C")


def config_of(kind: type[C], value: Any) -> C:
    """A function's config: the caller's, or the defaults for None.

    Args:
        kind: of config that the function takes.
        value: from the caller.

    Raises:
        TypeError: it is something else.
    """
    if value is not None and not isinstance(value, kind):
        raise TypeError(f"A {type(value).__name__} came where {kind.__name__} is needed: give {kind.__name__}(...).")
    return kind() if value is None else value


def check_threshold(threshold: float) -> None:
    """Raises ValueError unless an importance can be above or below a threshold."""
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold={threshold}: importances are in [0, 1], give a number from 0 to 1.")
