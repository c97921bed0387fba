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
import os
import re
from collections.abc import Collection
from dataclasses import fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from pydantic import ValidationError
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


def instance(name: str, value: Any, *kinds: type[C]) -> C:
    """An object of one of some classes; raises TypeError for anything else.

    Args:
        name: of the argument, for messages.
        value: from the caller.
        *kinds: the classes.
    """
    if not isinstance(value, kinds):
        needed = " or ".join(f"{'an' if kind.__name__[0] in 'AEIOU' else 'a'} {kind.__name__}" for kind in kinds)
        raise TypeError(f"{name}={shown(value)} is a {type(value).__name__}: give {needed}.")
    return value


def text_of(name: str, value: Any) -> str:
    """A string; raises TypeError for anything else."""
    if not isinstance(value, str):
        raise TypeError(f"{name}={shown(value)} is a {type(value).__name__}: give a string.")
    return value


def path_of(name: str, value: Any) -> Path:
    """A path from a string or path; raises TypeError for anything else, ValueError where no file can have the name."""
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
        raise TypeError(f"{name}={shown(value)} is a {type(value).__name__}: give a path as a string or Path.")
    try:
        longest = max(len(part.encode()) for part in re.split(r"[/\\]", os.fspath(value)))
    except UnicodeEncodeError:  # half of a surrogate pair
        longest = 256
    if not os.fspath(value) or longest > 255 or "\0" in os.fspath(value):
        raise ValueError(f"{name}={shown(value)} names no file or folder: give a path.")
    return Path(value)


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
    whole, allowed = item(value), _range(minimum, maximum)
    if isinstance(whole, bool) or not isinstance(whole, Integral):
        raise TypeError(f"{name}={shown(value)} is a {type(value).__name__}: give an integer{allowed}.")
    result = int(whole)
    if (minimum is not None and result < minimum) or (maximum is not None and result > maximum):
        raise ValueError(f"{name}={shown(value)}: give an integer{allowed}.")
    if not -(1 << 63) <= result <= LARGEST_SEED:
        raise ValueError(f"{name}={shown(value)} is beyond 64 bits: give an integer{allowed}.")
    return result


def number(
    name: str,
    value: Any,
    *,
    minimum: int | float | None = None,
    maximum: int | float | None = None,
    above: int | float | None = None,
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
    real, allowed = item(value), _range(minimum, maximum, above)
    if isinstance(real, bool) or not isinstance(real, Real):
        raise TypeError(f"{name}={shown(value)} is a {type(value).__name__}: give a number{allowed}.")
    result = _float(real)
    small = (minimum is not None and result < minimum) or (above is not None and result <= above)
    if not math.isfinite(result) or small or (maximum is not None and result > maximum):
        raise ValueError(f"{name}={shown(value)}: give a finite number{allowed}.")
    return result


def check_threshold(threshold: Any) -> float:
    """A threshold that an importance can be above or below; raises TypeError or ValueError otherwise."""
    try:
        return number("threshold", threshold, minimum=0, maximum=1)
    except ValueError:
        came = f"threshold={shown(threshold)}"
        raise ValueError(f"{came}: importances are in [0, 1], give a number from 0 to 1.") from None


def seed_of(value: Any, *, name: str = "seed") -> int:
    """A seed that PyTorch takes; raises TypeError or ValueError otherwise."""
    return integer(name, value, minimum=-(1 << 63), maximum=LARGEST_SEED)


def device_of(value: Any, *, name: str = "device") -> torch.device:
    """A device that tensors can be made on here.

    Args:
        value: from the caller, such as ``"cpu"``, ``"cuda:1"`` or a ``torch.device``.
        name: of the argument, for messages.

    Raises:
        TypeError: it is something else.
        ValueError: there is no such device, or not here; ``meta`` holds no numbers.
    """
    if not isinstance(value, str | torch.device):
        raise TypeError(f"{name}={shown(value)} is a {type(value).__name__}: give 'cpu', 'cuda' or a torch.device.")
    try:
        device = torch.device(value)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"{name}={shown(str(value))} is not a device of this PyTorch and machine: give 'cpu'."
        ) from error
    if device.type == "meta":
        raise ValueError(f"{name}='meta' holds no numbers: give 'cpu' or 'cuda'.")
    return device


def flag(name: str, value: Any) -> bool:
    """True or False; raises TypeError for anything else, so that ``"no"`` does not count as true."""
    answer: Any = item(value)
    if not isinstance(answer, bool):
        raise TypeError(f"{name}={shown(value)} is a {type(value).__name__}: give True or False.")
    return answer


Range = int | float | tuple[int | float | None, int | float | None]
"""The smallest number that is allowed, or the smallest and the largest (None: no limit)."""


def check_fields(config: Any, **ranges: Range) -> None:
    """Checks the fields of a dataclass by their annotations, and stores them in the type that is needed.

    ``int``, ``float`` and ``bool`` are checked as ``integer``, ``number`` and ``flag`` do, ``Sequence`` of numbers or of ``str``
    entry by entry (and become tuples); None is allowed where the annotation says so. Fields named ``seed`` and ``threshold`` are
    checked as such. All others are left alone.

    Args:
        config: in its ``__post_init__``; its module has ``from __future__ import annotations``.
        ranges: of numbers, by field.

    Raises:
        TypeError: a field is of another type.
        ValueError: a number is out of its range.
    """
    for field in fields(config):
        value, optional = getattr(config, field.name), field.type.endswith(" | None")
        if value is not None or not optional:
            kind = field.type.removesuffix(" | None")
            checked = _checked(field.name, kind, value, ranges.get(field.name, (None, None)))
            object.__setattr__(config, field.name, checked)


def _checked(name: str, kind: str, value: Any, limits: Range) -> Any:
    """A field's value in the type of its annotation."""
    minimum, maximum = limits if isinstance(limits, tuple) else (limits, None)
    if name == "seed":
        return seed_of(value)
    if name == "threshold":
        return check_threshold(value)
    if kind == "int":
        return integer(name, value, minimum=minimum, maximum=maximum)  # type: ignore[arg-type]
    if kind == "float":
        return number(name, value, minimum=minimum, maximum=maximum)
    if kind == "bool":
        return flag(name, value)
    if kind == "Sequence[str]" and isinstance(value, Tensor | np.ndarray):  # an empty one too
        raise TypeError(f"{name} is {'a tensor' if isinstance(value, Tensor) else 'an array'}: give names in a list.")
    if kind in ("Sequence[int]", "Sequence[float]", "Sequence[str]"):
        return tuple(_checked(f"{name}[{i}]", kind[9:-1], v, limits) for i, v in enumerate(sequence(name, value)))
    return text_of(name, value) if kind == "str" else value


def sequence(name: str, value: Any) -> list[Any]:
    """Several values in a list, tuple or array; raises TypeError for a string, a mapping, a set or a single value."""
    if isinstance(value, str | bytes):
        raise TypeError(f"{name}={shown(value)} is a string: give names in a list, such as [{shown(value)}].")
    one_axis = getattr(value, "ndim", 1) == 1 and hasattr(value, "__getitem__") and hasattr(value, "__len__")
    if not one_axis or hasattr(value, "keys"):
        raise TypeError(f"{name}={shown(value)} is a {type(value).__name__}: give values in a list.")
    return list(value)


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
        raise ValueError(f"{name}={shown(value)}{near}: choose from {', '.join(map(repr, allowed))}.")
    return value


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises ValueError if a tensor of numbers has NaN or infinite entries."""
    if not bool(tensor.isfinite().all()):
        count = int((~tensor.isfinite()).sum())
        raise ValueError(
            f"{name} has {count} of {tensor.numel()} entries that are NaN or infinite: give finite numbers."
        )


def sentence_of(error: ValidationError) -> str:
    """The first problem that pydantic reports, in one line: the field, what came, what is allowed."""
    first = error.errors(include_url=False)[0]
    where, message = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
    came = "" if first["type"] == "missing" or not where else f"={shown(first['input'])}"
    text = f"{where}{came}: {message}" if where else message
    return text if text.endswith(".") else f"{text}."


def item(value: Any) -> Any:
    """The number in a tensor or array of one, anything else unchanged."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _float(real: Real) -> float:
    """A number as a float, infinite where it is too large for one."""
    try:
        return float(real)
    except OverflowError:
        return math.inf


def shown(value: Any) -> str:
    """A value for a message: on one line, cut where it is long; tensors, arrays and tables of many entries as their shape."""
    try:
        if math.prod(getattr(value, "shape", ())) > 8:
            return f"<{type(value).__name__} of shape {tuple(value.shape)}>"
        text = " ".join(repr(item(value)).split())
    except Exception:  # an integer of more digits than Python prints, an object that cannot say what it is
        return f"<{type(value).__name__}>" if not isinstance(value, int) else "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _range(minimum: int | float | None, maximum: int | float | None, above: int | float | None = None) -> str:
    if above is not None:
        return f" above {above}" + ("" if maximum is None else f" and at most {maximum}")
    if minimum is not None and maximum is not None:
        return f" from {minimum} to {maximum}"
    if minimum is not None:
        return f" of at least {minimum}"
    return "" if maximum is None else f" of at most {maximum}"
