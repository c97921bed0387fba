"""Hooks that touch a few subcomponents, and HookPoints that know it: taking k of C out costs k of C.

A site with no mode on it and none but such hooks computes ``x @ V[:, S]`` and ``· @ U[S]`` for the union S of what they touch:

    y = y₀ + (a'_S ⊙ m_S − a_S) @ U[S],      a_S = x @ V[:, S]

Each hook is an ordinary hook function as well, so that it composes with every other hook on the full axis.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_vpd.adapters.versions import HookPoint

Positions = int | np.integer | slice | Sequence[int] | Tensor | np.ndarray | None
"""Positions of each forward pass: an index, a slice, several indices, a mask ``[pos]``, or None for all."""


@dataclass(frozen=True)
class Sparse(ABC):
    """A hook on the last axis's ``indices`` alone, at some positions."""

    indices: tuple[int, ...]
    pos: Positions

    @abstractmethod
    def __call__(self, tensor: Tensor, hook: Any) -> Tensor:
        """The tensor with its columns changed."""

    def at(self, columns: dict[int, int]) -> Sparse:
        """The same hook where subcomponent ``c`` stands in column ``columns[c]``."""
        return replace(self, indices=tuple(columns[i] for i in self.indices))

    def rows(self, tensor: Tensor, hook: Any) -> Tensor | slice:
        """The positions that are touched, as an index of axis 1."""
        if self.pos is None:
            return slice(None)
        if tensor.ndim < 3:
            raise IndexError(f"pos={self.pos} was given, and {hook.name} has no positions.")
        return rows_of(self.pos, tensor.shape[1], tensor.device, hook.name)


def rows_of(pos: Positions, n: int, device: torch.device, name: str) -> Tensor:
    """Positions as indices below ``n``.

    Raises:
        IndexError: there is no such position. TypeError: these are no positions.
    """
    if pos is None or isinstance(pos, slice):
        chosen = range(n)[slice(None) if pos is None else pos]
        return torch.arange(chosen.start, chosen.stop if chosen else chosen.start, chosen.step, device=device)
    alone = isinstance(pos, int | Tensor | np.ndarray | np.generic)
    index = torch.as_tensor(pos if alone else list(pos), device=device)  # type: ignore[arg-type]
    if not index.numel() and index.dtype != torch.bool:
        index = index.long()
    if index.is_floating_point() or index.ndim > 1:
        raise TypeError(f"pos={pos}: give an index, a slice, a sequence of indices, or a mask of one axis.")
    try:
        return torch.arange(n, device=device)[index.reshape(-1)]
    except IndexError as error:
        raise IndexError(f"pos={pos} is outside the {n} positions at {name}.") from error


@dataclass(frozen=True)
class Ablate(Sparse):
    """Multiplies some subcomponents' masks by ``1 − amount``."""

    amount: float

    def __call__(self, tensor: Float[Tensor, "batch *pos C"], hook: Any) -> Float[Tensor, "batch *pos C"]:
        """The mask with some factors lowered."""
        factor = torch.ones_like(tensor)
        columns = torch.tensor(self.indices, device=tensor.device)
        if self.pos is None:
            factor[..., columns] = 1.0 - self.amount
        else:
            factor[:, self.rows(tensor, hook)[:, None], columns] = 1.0 - self.amount  # type: ignore[index]
        return tensor * factor


@dataclass(frozen=True)
class AblateEach(Sparse):
    """Many ablations in one pass: copy ``copies[i]`` of ``batch`` prompts goes without ``indices[i]``.

    On masks, factors become ``1 − amount`` times what they were; with ``values`` (broadcasting to ``[batch, pos, n]``) the
    hook belongs on activations, which move by ``amount`` of the way to them.
    """

    copies: tuple[int, ...]
    batch: int
    amount: float
    values: Float[Tensor, "*rows n"] | None = field(default=None, repr=False)

    def __call__(self, tensor: Float[Tensor, "all *pos C"], hook: Any) -> Float[Tensor, "all *pos C"]:
        """The masks or activations with one column of each copy changed."""
        within = torch.arange(self.batch, device=tensor.device)
        rows = (torch.tensor(self.copies, device=tensor.device)[:, None] * self.batch + within).flatten()
        columns = torch.tensor(self.indices, device=tensor.device).repeat_interleave(self.batch)
        index: tuple[Tensor, ...] = (rows, columns)
        if tensor.ndim == 3:
            pos = rows_of(self.pos, tensor.shape[1], tensor.device, hook.name)
            index = (rows[:, None], pos, columns[:, None])
        else:
            self.rows(tensor, hook)  # raises if positions were asked for
        own = tensor[index]
        if self.values is None:
            return tensor.index_put(index, own * (1.0 - self.amount))
        full = self.values.to(own).expand(self.batch, *tensor.shape[1:-1], len(self.indices))
        values = full.movedim(-1, 0).flatten(0, 1)  # [n * batch, pos]
        return tensor.index_put(index, torch.lerp(own, values[:, pos] if tensor.ndim == 3 else values, self.amount))


@dataclass(frozen=True)
class Replace(Sparse):
    """Moves some activations by ``amount`` of the way to given values: mean- and resample-ablation."""

    values: Float[Tensor, "*rows k"] = field(repr=False)
    amount: float

    def __call__(self, tensor: Float[Tensor, "batch *pos C"], hook: Any) -> Float[Tensor, "batch *pos C"]:
        """The activations with some columns moved; values broadcast to ``[batch, pos, k]``."""
        columns = torch.tensor(self.indices, device=tensor.device)
        own = tensor[..., columns]
        try:
            moved = torch.lerp(own, self.values.to(own).expand_as(own), self.amount)
        except RuntimeError as error:
            raise ValueError(
                f"The values for {hook.name} are {tuple(self.values.shape)}, this forward pass needs {tuple(own.shape)}: give "
                "means, or activations of prompts of the same shape."
            ) from error
        if self.pos is not None:
            at = torch.zeros(tensor.shape[1], 1, dtype=torch.bool, device=tensor.device)
            at[self.rows(tensor, hook)] = True
            moved = torch.where(at, moved, own)
        return tensor.index_copy(-1, columns, moved)


class SparsePoint(HookPoint):
    """A HookPoint that remembers which hooks on it are ``Sparse``."""

    def __init__(self) -> None:
        super().__init__()
        self._sparse: dict[int, Sparse] = {}

    def add_hook(self, hook: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        """As HookPoint's."""
        before = set(self._forward_hooks)
        handle = super().add_hook(hook, *arguments, **keywords)
        if isinstance(hook, Sparse):
            self._sparse = {key: own for key, own in self._sparse.items() if key in before}
            self._sparse.update((key, hook) for key in self._forward_hooks if key not in before)
        return handle

    def sparse_hooks(self) -> list[Sparse] | None:
        """The hooks on it in order, if all of them are sparse."""
        if self._backward_hooks or any(key not in self._sparse for key in self._forward_hooks):
            return None
        return [self._sparse[key] for key in self._forward_hooks]
