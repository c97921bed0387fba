"""Positions of a forward pass, in every form in which users have them.

>>> checked_positions(range(2, 4)), checked_positions(-1)
((2, 3), (-1,))
>>> position_indices(slice(5, None), 7, torch.device("cpu"), "hook_q_mask")
tensor([5, 6])

Positions that are not there, and forms that select none, are refused: a hook that acts nowhere looks like one without effect.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from tl_vpd.checks import shown

Positions = int | np.integer | slice | Sequence[int | np.integer] | Tensor | np.ndarray | None
"""Positions of each forward pass: an index, a slice, several indices, a mask ``[pos]`` (True: this one), or None for all."""
CheckedPositions = slice | tuple[int, ...] | None
"""A slice of Python's integers, indices, or a mask as a tuple of bools."""

LARGEST = 2**31
"""No pass has so many positions."""
_CACHED = "a pass behind a KV cache has the new ones only"


def checked_positions(pos: Any) -> CheckedPositions:
    """Positions in one of few forms.

    Args:
        pos: see ``Positions``.

    Raises:
        TypeError: ``pos`` is something else than positions.
        IndexError: no pass has such a position.
        ValueError: it selects none in any pass.
    """
    if pos is None:
        return None
    try:
        if isinstance(pos, slice):
            checked = slice(*(None if i is None else operator.index(i) for i in (pos.start, pos.stop, pos.step)))
            if checked.step == 0:
                raise ValueError(f"pos={shown(pos)}: the step of a slice is not 0.")
            return checked
        if isinstance(pos, Tensor | np.ndarray) and pos.ndim == 1:
            pos = pos.tolist()
        if not isinstance(pos, Sequence) or isinstance(pos, str | bytes):
            pos = [_index(pos)]
        masks = sum(isinstance(p, bool | np.bool_) for p in pos)
        if masks not in (0, len(pos)):
            raise TypeError("a mixture of bools and indices")
        entries = tuple(bool(p) for p in pos) if masks else tuple(_index(p) for p in pos)
    except TypeError:
        came = f"pos={shown(pos)}" if isinstance(pos, str | float | slice) else f"pos is a {type(pos).__name__}"
        raise TypeError(
            f"{came}: give an index, a slice, a sequence of indices, or a mask of one axis (True at the positions)."
        ) from None
    if not entries or (masks and not any(entries)):
        raise ValueError(f"pos={shown(pos)} selects no position: name one or more, or None for all.")
    return entries


def position_indices(pos: Positions, n: int, device: torch.device, name: str) -> Int[Tensor, " selected"]:
    """Positions as indices below ``n``.

    Args:
        pos: see ``Positions``.
        n: number of positions of the pass.
        device: of the result.
        name: of the HookPoint or site, for messages.

    Raises:
        IndexError: there is no such position.
    """
    pos = checked_positions(pos)
    if pos is None:
        return torch.arange(n, device=device)
    if isinstance(pos, slice):
        selected = range(n)[pos]
        if not selected:
            raise IndexError(f"pos={shown(pos)} selects none of the {n} positions at {name} ({_CACHED}).")
        return torch.tensor(selected, device=device)
    if isinstance(pos[0], bool):
        if len(pos) != n:
            raise IndexError(f"pos is a mask of {len(pos)} positions, and there are {n} at {name} ({_CACHED}).")
        return torch.tensor([i for i, selects in enumerate(pos) if selects], device=device)
    for p in pos:
        if not -n <= p < n:
            raise IndexError(f"pos={shown(p)} is outside the {n} positions at {name} ({_CACHED}).")
    return torch.tensor([p % n for p in pos], device=device)


def axis_positions(pos: Positions, tensor: Tensor, name: str) -> Int[Tensor, " selected"]:
    """``position_indices`` axis 1 of a tensor ``[batch, pos, C]``; raises IndexError where there is no such axis.

    Args:
        pos: see ``Positions``.
        tensor: activations or masks.
        name: of the HookPoint or site, for messages.
    """
    if tensor.ndim < 3:
        raise IndexError(f"pos={shown(pos)} needs positions, and {name} has none.")
    return position_indices(pos, tensor.shape[1], tensor.device, name)


def _index(value: Any) -> int:
    """An integer; raises TypeError for anything else."""
    if isinstance(value, bool | np.bool_) or (isinstance(value, Tensor) and value.dtype == torch.bool):
        raise TypeError("a bool")
    index = operator.index(value)
    if not -LARGEST <= index <= LARGEST:
        raise IndexError(f"pos={shown(value)} is outside the positions of any pass.")
    return index
