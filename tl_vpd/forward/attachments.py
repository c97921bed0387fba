"""Which decompositions are attached to which models now. References are weak: the model has the strong one."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

from torch import nn

from tl_vpd.importance import DecomposedWeights


@runtime_checkable
class Attachment(Protocol):
    """A decomposition on a model, as the rooms below ``tl_vpd.hooks`` need to know it."""

    decomposition: DecomposedWeights
    model: nn.Module
    sites: list[str]
    hook_points: dict[str, dict[str, Any]]

    def paused(self) -> AbstractContextManager[None]:
        """Inside, the model runs as if nothing were attached."""


_attached: weakref.WeakSet[Attachment] = weakref.WeakSet()


def attached_to(model: nn.Module) -> Attachment | None:
    """The attachment of this model, if there is one."""
    return next((a for a in _attached if a.model is model), None)


def attachments(decomposition: DecomposedWeights) -> list[Attachment]:
    """All attachments of a decomposition."""
    return [a for a in _attached if a.decomposition is decomposition]


def add(attached: Attachment) -> None:
    """Registers an attachment."""
    _attached.add(attached)


def discard(attached: Attachment) -> None:
    """Removes an attachment."""
    _attached.discard(attached)
