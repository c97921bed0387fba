"""Hooks that touch a few subcomponents, and HookPoints that know it: ablating k of C subcomponents computes k columns.

A site without a mode and with such hooks only computes ``x @ V[:, S]`` and ``· @ U[S]`` for the union S of what they touch:

    y = y₀ + (a'_S ⊙ m_S − a_S) @ U[S],      a_S = x @ V[:, S]

Each hook is an ordinary hook function as well, so that it composes with every other hook on the full axis.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_vpd.adapters.versions import HookPoint
from tl_vpd.hooks.positions import Positions, axis_positions, checked_positions
from tl_vpd.masking.factors import check_axes


@dataclass(frozen=True)
class Sparse(ABC):
    """A hook on ``indices`` of the last axis, at ``pos`` of the position axis."""

    indices: tuple[int, ...]
    pos: Positions

    def __post_init__(self) -> None:
        object.__setattr__(self, "pos", checked_positions(self.pos))

    @abstractmethod
    def __call__(self, tensor: Tensor, hook: Any) -> Tensor:
        """The tensor with its columns changed."""

    def at(self, columns: dict[int, int]) -> Sparse:
        """The same hook where subcomponent ``c`` stands in column ``columns[c]``."""
        return replace(self, indices=tuple(columns[i] for i in self.indices))

    def positions(self, tensor: Tensor, hook: Any) -> Tensor | slice:
        """The positions that the hook acts on, as an index of axis 1."""
        return slice(None) if self.pos is None else axis_positions(self.pos, tensor, hook.name)


@dataclass(frozen=True)
class Ablate(Sparse):
    """Multiplies the masks of subcomponents by ``1 − amount``."""

    amount: float

    def __call__(self, tensor: Float[Tensor, "batch *pos C"], hook: Any) -> Float[Tensor, "batch *pos C"]:
        """The mask with those factors lowered."""
        factor = torch.ones_like(tensor)
        columns = torch.tensor(self.indices, device=tensor.device)
        if self.pos is None:
            factor[..., columns] = 1.0 - self.amount
        else:
            factor[:, self.positions(tensor, hook)[:, None], columns] = 1.0 - self.amount  # type: ignore[index]
        return tensor * factor


@dataclass(frozen=True)
class AblateEach(Sparse):
    """Many ablations in one pass: copy ``copies[i]`` of ``batch`` prompts runs without ``indices[i]``.

    On masks, factors are multiplied by ``1 − amount``; with ``values`` (``[n]``, or ``[batch or 1, pos or 1, n]``) the hook
    belongs on activations, which move by ``amount`` of the way to them.
    """

    copies: tuple[int, ...]
    batch: int
    amount: float
    values: Float[Tensor, "*rows n"] | None = field(default=None, repr=False)

    def __call__(self, tensor: Float[Tensor, "all *pos C"], hook: Any) -> Float[Tensor, "all *pos C"]:
        """The masks or activations with one column changed per copy."""
        within = torch.arange(self.batch, device=tensor.device)
        rows = (torch.tensor(self.copies, device=tensor.device)[:, None] * self.batch + within).flatten()
        columns = torch.tensor(self.indices, device=tensor.device).repeat_interleave(self.batch)
        index: tuple[Tensor, ...] = (rows, columns)
        if tensor.ndim == 3:
            pos = axis_positions(self.pos, tensor, hook.name)
            index = (rows[:, None], pos, columns[:, None])
        else:
            self.positions(tensor, hook)  # raises where ``pos`` is not None
        entries = tensor[index]
        if self.values is None:
            return tensor.index_put(index, entries * (1.0 - self.amount))
        shape = (self.batch, *tensor.shape[1:-1], len(self.indices))
        check_axes(f"values for {hook.name}", self.values, shape, shared=1)
        values = self.values.to(entries).expand(shape).movedim(-1, 0).flatten(0, 1)  # [n * batch, pos]
        return tensor.index_put(index, torch.lerp(entries, values[:, pos] if tensor.ndim == 3 else values, self.amount))


@dataclass(frozen=True)
class Replace(Sparse):
    """Moves activations by ``amount`` of the way to values: mean- and resample-ablation."""

    values: Float[Tensor, "*rows k"] = field(repr=False)
    amount: float

    def __call__(self, tensor: Float[Tensor, "batch *pos C"], hook: Any) -> Float[Tensor, "batch *pos C"]:
        """The activations with those columns moved; values are ``[k]``, or ``[batch or 1, pos or 1, k]``."""
        columns = torch.tensor(self.indices, device=tensor.device)
        acts = tensor[..., columns]
        check_axes(f"values for {hook.name}", self.values, acts.shape, shared=1)
        moved = torch.lerp(acts, self.values.to(acts).expand_as(acts), self.amount)
        if self.pos is not None:
            where = torch.zeros(tensor.shape[1], 1, dtype=torch.bool, device=tensor.device)
            where[self.positions(tensor, hook)] = True
            moved = torch.where(where, moved, acts)
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
            self._sparse = {key: other for key, other in self._sparse.items() if key in before}
            self._sparse.update((key, hook) for key in self._forward_hooks if key not in before)
        return handle

    def sparse_hooks(self) -> list[Sparse] | None:
        """The hooks on it in order, if all of them are sparse."""
        if self._backward_hooks or any(key not in self._sparse for key in self._forward_hooks):
            return None
        return [self._sparse[key] for key in self._forward_hooks]
