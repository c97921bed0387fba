"""Checks of what functions take. Each returns the value in the type that is needed, or raises one sentence: the argument, what
came and what is allowed.

>>> integer("k", 3, minimum=1), number("amount", 1, maximum=2)
(3, 1.0)
>>> integer("k", -1, minimum=1)
Traceback (most recent call last):
ValueError: k=-1: give an integer of at least 1.

NumPy's numbers and tensors of one number count as numbers; bools and strings do not.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any, TypeVar

from torch import Tensor

from tl_vpd.site import nearest

C = TypeVar("C")
LARGEST_SEED = (1 << 64) - 1
"""The largest seed that PyTorch's generators take; the smallest is −2⁶³."""


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


def integer(name: str, value: Any, *, minimum: int | None = None, maximum: int | None = None) -> int:
    """A whole number in a range.

    Args:
        name: of the argument, for messages.
        value: from the caller.
        minimum: the smallest allowed.
        maximum: the largest allowed.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is out of range.
    """
    number = _item(value)
    if isinstance(number, bool) or not isinstance(number, Integral):
        raise TypeError(
            f"{name}={_shown(value)} is a {type(value).__name__}: give an integer{_range(minimum, maximum)}."
        )
    if (minimum is not None and number < minimum) or (maximum is not None and number > maximum):
        raise ValueError(f"{name}={_shown(value)}: give an integer{_range(minimum, maximum)}.")
    return int(number)


def number(
    name: str, value: Any, *, minimum: float | None = None, maximum: float | None = None, above: float | None = None
) -> float:
    """A finite number in a range.

    Args:
        name: of the argument, for messages.
        value: from the caller.
        minimum: the smallest allowed.
        maximum: the largest allowed.
        above: what it must exceed.

    Raises:
        TypeError: it is not a number.
        ValueError: it is not finite, or out of range.
    """
    real = _item(value)
    if isinstance(real, bool) or not isinstance(real, Real):
        raise TypeError(
            f"{name}={_shown(value)} is a {type(value).__name__}: give a number{_range(minimum, maximum, above)}."
        )
    result = float(real)
    small = (minimum is not None and result < minimum) or (above is not None and result <= above)
    if not math.isfinite(result) or small or (maximum is not None and result > maximum):
        raise ValueError(f"{name}={_shown(value)}: give a finite number{_range(minimum, maximum, above)}.")
    return result


def check_threshold(threshold: Any) -> float:
    """A threshold that an importance can be above or below; raises TypeError or ValueError otherwise."""
    value = _item(threshold)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"threshold={_shown(threshold)} is a {type(threshold).__name__}: give a number from 0 to 1.")
    if not 0 <= value <= 1:
        raise ValueError(f"threshold={_shown(threshold)}: importances are in [0, 1], give a number from 0 to 1.")
    return float(value)


def seed_of(value: Any, *, name: str = "seed") -> int:
    """A seed that PyTorch takes; raises TypeError or ValueError otherwise."""
    return integer(name, value, minimum=-(1 << 63), maximum=LARGEST_SEED)


def choice(name: str, value: Any, allowed: Collection[str]) -> str:
    """One of a few strings.

    Args:
        name: of the argument, for messages.
        value: from the caller.
        allowed: the strings.

    Raises:
        ValueError: it is another one; the message has the nearest.
    """
    if not isinstance(value, str) or value not in allowed:
        near = nearest(value, allowed) if isinstance(value, str) else ""
        raise ValueError(f"{name}={_shown(value)}{near}: choose from {', '.join(map(repr, allowed))}.")
    return value


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises ValueError if a tensor of numbers has NaN or infinite entries."""
    if not bool(tensor.isfinite().all()):
        count = int((~tensor.isfinite()).sum())
        raise ValueError(
            f"{name} has {count} of {tensor.numel()} entries that are NaN or infinite: give finite numbers."
        )


def _item(value: Any) -> Any:
    """The number in a tensor or array of one, anything else unchanged."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    try:
        text = repr(_item(value))
    except ValueError:  # an integer of more digits than Python prints
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _range(minimum: float | None, maximum: float | None, above: float | None = None) -> str:
    if above is not None:
        return f" above {above}" + ("" if maximum is None else f" and at most {maximum}")
    if minimum is not None and maximum is not None:
        return f" from {minimum} to {maximum}"
    if minimum is not None:
        return f" of at least {minimum}"
    return "" if maximum is None else f" of at most {maximum}"
