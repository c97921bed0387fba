"""The configs that functions take."""

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
