"""Which decompositions are attached to which models now. Held weakly: a model holds what is attached to it."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from tl_vpd.decomposition import Decomposition
    from tl_vpd.hooks.attached import Attached

_attached: weakref.WeakSet[Attached] = weakref.WeakSet()


def attached_to(model: nn.Module) -> Attached | None:
    """What is attached to this model, if anything."""
    return next((a for a in _attached if a.model is model), None)


def own_attachment(decomposition: Decomposition, model: nn.Module) -> Attached | None:
    """What is attached to this model, if it is this decomposition; raises ValueError if it is another one."""
    found = attached_to(model)
    if found is not None and found.decomposition is not decomposition:
        raise ValueError("Another decomposition is attached to this model: detach it first.")
    return found


def attachments(decomposition: Decomposition) -> list[Attached]:
    """Where the decomposition is attached now."""
    return [a for a in _attached if a.decomposition is decomposition]


def add(attached: Attached) -> None:
    """Notes that it is attached."""
    _attached.add(attached)


def discard(attached: Attached) -> None:
    """Notes that it is attached no longer."""
    _attached.discard(attached)
