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


_attached: weakref.WeakValueDictionary[int, Attachment] = weakref.WeakValueDictionary()
"""By the model's ``id``."""


def attached_to(model: nn.Module) -> Attachment | None:
    """The attachment of this model, if there is one."""
    attached = _attached.get(id(model))
    return attached if attached is not None and attached.model is model else None


def all_attachments() -> list[Attachment]:
    """Those of all models."""
    return list(_attached.values())


def attachments(decomposition: DecomposedWeights) -> list[Attachment]:
    """All attachments of a decomposition."""
    return [a for a in all_attachments() if a.decomposition is decomposition]


def add(attached: Attachment) -> None:
    """Registers an attachment."""
    _attached[id(attached.model)] = attached


def discard(attached: Attachment) -> None:
    """Removes an attachment."""
    if _attached.get(id(attached.model)) is attached:
        del _attached[id(attached.model)]
