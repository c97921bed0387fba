"""Kinds of arguments: which values are right, which are wrong, and of which either may be said.

A kind is a function from a value to True (it must be accepted), False (it must be refused) or None (accepted or refused with a
sentence, both are sensible). They are written without the package's own checks, from what each argument means.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from fractions import Fraction
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Verdict = bool | None
Kind = Callable[[Any], Verdict]
LARGE = 2**31
"""Integers beyond it are right where any integer is, but no machine can do so many steps or rows: refusing them is right too."""


def plain(value: Any) -> Any:
    """The number in a tensor or array of no axes."""
    if (
        isinstance(value, Tensor | np.ndarray | np.generic)
        and value.ndim == 0
        and str(getattr(value, "device", "")) != "meta"
    ):
        return value.item()
    return value


def optional(kind: Kind) -> Kind:
    """None too."""
    return lambda value: True if value is None else kind(value)


def either(kind: Kind) -> Kind:
    """What is wrong for ``kind`` may be accepted; what is right must be."""
    return lambda value: kind(value) or None


def integer(minimum: int | None = None, maximum: int | None = None, *, size: bool = True) -> Kind:
    """Whole numbers in a range; bools are not numbers.

    Args:
        minimum: the smallest.
        maximum: the largest.
        size: whether it says how much is to be done, so that astronomic ones may be refused.
    """

    def verdict(value: Any) -> Verdict:
        value = plain(value)
        if isinstance(value, bool | np.bool_) or not isinstance(value, Integral):
            return False
        if (minimum is not None and value < minimum) or (maximum is not None and value > maximum):
            return False
        return None if size and abs(value) >= LARGE else True

    return verdict


def number(minimum: float | None = None, maximum: float | None = None, *, above: float | None = None) -> Kind:
    """Finite numbers in a range; bools are not numbers.

    Args:
        minimum: the smallest.
        maximum: the largest.
        above: what they exceed.
    """

    def verdict(value: Any) -> Verdict:
        value = plain(value)
        if isinstance(value, bool | np.bool_) or not isinstance(value, Real):
            return False
        if isinstance(value, Integral) and abs(value) > 10**300:
            return False
        if isinstance(value, Fraction):
            return None
        if not math.isfinite(value) or (minimum is not None and value < minimum):
            return False
        if (maximum is not None and value > maximum) or (above is not None and value <= above):
            return False
        return None if value and not 1e-30 < abs(value) < 1e30 else True

    return verdict


def how_many(value: Any) -> Verdict:
    """How many rows of a table; none may be asked for, or refused."""
    return None if integer(0, 0)(value) else integer(1)(value)


def factor(value: Any) -> Verdict:
    """What a mask or activation is multiplied by; beyond the range of float16 it may be refused."""
    verdict = number()(value)
    return None if verdict and not number(-65504, 65504)(value) else verdict


def factor_or_tensor(value: Any) -> Verdict:
    """A factor, or a tensor of one per token, which is checked where it meets the tokens."""
    return None if isinstance(value, Tensor) else factor(value)


SEED = integer(-(2**63), 2**64 - 1, size=False)


def boolean(value: Any) -> Verdict:
    """True and False; NumPy's, and tensors of one bool, as you like."""
    if isinstance(value, bool):
        return True
    return None if isinstance(plain(value), bool) or (isinstance(value, int) and value in (0, 1)) else False


def text(value: Any) -> Verdict:
    """Any string."""
    return isinstance(value, str) or False


def choice(*allowed: str) -> Kind:
    """Some strings."""
    return lambda value: isinstance(value, str) and value in allowed


def only(*canonical: Any) -> Kind:
    """These objects alone."""
    return lambda value: any(value is c for c in canonical)


def equal(*canonical: Any) -> Kind:
    """Values equal to these and of the same type."""
    return lambda value: any(type(value) is type(c) and value == c for c in canonical)


def own(canonical: Any) -> Kind:
    """This object, or any other function: what a caller's own function raises is the caller's to see."""
    return lambda value: value is canonical or (None if callable(value) else False)


def any_module(value: Any) -> Verdict:
    """Any model has an answer."""
    return isinstance(value, nn.Module)


def instance(*classes: type) -> Kind:
    """Objects of a class."""
    return lambda value: isinstance(value, classes)


def sequence(kind: Kind, *, minimum: int = 1, other: Kind | None = None) -> Kind:
    """Lists, tuples and the like of one kind; a string is not one.

    Args:
        kind: of its members.
        minimum: how many there are at least.
        other: what is right without being a sequence.
    """

    def verdict(value: Any) -> Verdict:
        if other is not None and other(value) is not False:
            return other(value)
        if isinstance(value, set | frozenset | range | np.ndarray | Tensor | dict) or hasattr(value, "__next__"):
            try:
                members = list(value)
            except Exception:
                return False
            return (
                None
                if len(members) >= minimum and all(kind(plain(m)) is not False for m in members)
                else _unless(members)
            )
        if not isinstance(value, list | tuple):
            return False
        if len(value) < minimum:
            return False
        return _all([kind(member) for member in value])

    return verdict


def _unless(members: list[Any]) -> Verdict:
    return False if members else None


def _all(verdicts: list[Verdict]) -> Verdict:
    if any(v is False for v in verdicts):
        return False
    return None if any(v is None for v in verdicts) else True


def any_of(*kinds: Kind) -> Kind:
    """What one of the kinds accepts."""

    def verdict(value: Any) -> Verdict:
        verdicts = [kind(value) for kind in kinds]
        return True if True in verdicts else (None if None in verdicts else False)

    return verdict


def tokens(vocabulary: int = 11, context: int = 10, *, rows: int | None = None, one_row: bool = False) -> Kind:
    """Tokens ``[batch, pos]``; a row alone, arrays and lists of numbers may be read or refused.

    Args:
        vocabulary: number of tokens that exist.
        context: the longest row.
        rows: how many there must be (None: any).
        one_row: whether it is one prompt.
    """

    def verdict(value: Any) -> Verdict:
        if not isinstance(value, Tensor):
            return None if isinstance(value, list | tuple | np.ndarray) and _numbers(value) else False
        if value.device.type == "meta" or value.layout != torch.strided:
            return False
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool or not value.numel():
            return False
        if value.ndim not in (1, 2) or value.shape[-1] > context:
            return False
        if int(value.min()) < 0 or int(value.max()) >= vocabulary:
            return False
        if (
            value.ndim == 1
            or value.shape[1] < 2
            or (one_row and len(value) != 1)
            or (rows is not None and len(value) != rows)
        ):
            return None
        return True

    return verdict


def _numbers(value: Any) -> bool:
    try:
        array = np.asarray(value)
    except (ValueError, TypeError):
        return False
    return array.dtype.kind in "iu" and array.size > 0


def attention_mask(batch: int, pos: int) -> Kind:
    """0 and 1 of every token, with a real one in each row; one that says nothing may be anything of the right shape."""

    def verdict(value: Any) -> Verdict:
        if value is None:
            return True
        if isinstance(value, list | tuple | np.ndarray):
            try:
                value = torch.as_tensor(np.asarray(value))
            except (TypeError, ValueError):
                return False
            return None if verdict(value) else False
        if (
            not isinstance(value, Tensor)
            or value.device.type == "meta"
            or value.layout != torch.strided
            or value.ndim != 2
        ):
            return False
        if tuple(value.shape) not in ((batch, pos), (1, pos)) or value.is_complex():
            return False
        if not bool(((value == 0) | (value == 1)).all()) or not bool((value == 1).any(-1).all()):
            return False
        return True if value.shape[0] == batch and not value.is_floating_point() else None

    return verdict


def patterns(names: list[str]) -> Kind:
    """Site patterns."""
    from fnmatch import fnmatchcase

    def one(value: Any) -> Verdict:
        return isinstance(value, str) and any(fnmatchcase(name, value) for name in names)

    return optional(sequence(one, other=one))


def subcomponents(counts: Mapping[str, int], *, minimum: int = 1, lists: bool = True, none: bool = False) -> Kind:
    """Addresses of subcomponents, as text or as ``Subcomponent``.

    Args:
        counts: number of subcomponents by site.
        minimum: how many addresses there are at least; fewer may be refused or not.
        lists: whether several are right.
        none: whether None is right.
    """
    from tl_vpd import Subcomponent

    def one(value: Any) -> Verdict:
        if isinstance(value, Subcomponent):
            return value.site in counts and 0 <= value.index < counts[value.site]
        if not isinstance(value, str) or ":" not in value:
            return False
        site, _, index = value.rpartition(":")
        return index.isdecimal() and site in counts and int(index) < counts[site]

    kind = sequence(one, minimum=minimum, other=one) if lists else one

    def verdict(value: Any) -> Verdict:
        if value is None and none:
            return True
        return None if lists and isinstance(value, list | tuple) and not value else kind(value)

    return verdict


def positions(n: int, *, none: bool = True) -> Kind:
    """Positions of a pass of ``n``: an index, a slice, indices or a mask; none at all may be refused or not."""

    def verdict(value: Any) -> Verdict:
        if value is None:
            return none
        if isinstance(value, slice):
            try:
                return bool(range(n)[value])
            except (TypeError, ValueError):
                return False
        if integer(-n, n - 1)(value):
            return True
        if (
            isinstance(value, Tensor | np.ndarray)
            and value.ndim == 1
            and len(value) == n
            and value.dtype in (torch.bool, bool)
        ):
            return True
        many = sequence(integer(-n, n - 1))(value)
        return many

    return verdict


def folder_to_write(value: Any) -> Verdict:
    """A path where a folder is or can be made."""
    path = _path(value)
    if path is None:
        return None if isinstance(value, str) and not value else False
    if path.is_dir():
        return True
    return not path.exists() and all(p.is_dir() or not p.exists() for p in path.parents)


def file_to_write(value: Any) -> Verdict:
    """A path where a file is or can be made."""
    path = _path(value)
    if path is None:
        return False
    return path.is_file() or (not path.exists() and path.parent.is_dir())


def path_to_read(canonical: Path) -> Kind:
    """The one path where it is; what other calls have written may be read too."""

    def verdict(value: Any) -> Verdict:
        if isinstance(value, str) and not value:  # the current folder, where other calls have written too
            return None
        path = _path(value)
        return path == canonical or (None if path is not None and path.exists() else False)

    return verdict


def _path(value: Any) -> Path | None:
    if not isinstance(value, str | os.PathLike) or not str(value) or "\0" in str(value) or len(str(value)) > 200:
        return None
    return Path(value)


def device(value: Any) -> Verdict:
    """The one device of a machine without accelerators."""
    if isinstance(value, torch.device):
        return value.type == "cpu"
    return None if value is None else value == "cpu" if isinstance(value, str) else False


def floating_dtype(value: Any) -> Verdict:
    """A dtype of real numbers, or None."""
    if value is None:
        return True
    return isinstance(value, torch.dtype) and value.is_floating_point
