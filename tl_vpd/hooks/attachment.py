"""What a decomposition has on a model while it is attached. The model has the one strong reference to it.

The user's object is ``Attached``. If nobody has that any more, the model stays attached, and ``attached_to(model)`` makes a new
one; the next ``attach`` removes what is left.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from torch import nn

from tl_vpd.adapters import Adapter
from tl_vpd.adapters.changes import Change, Later, put_attribute
from tl_vpd.adapters.versions import HookPoint
from tl_vpd.forward import CastWeights, attachments
from tl_vpd.forward.remains import copies_are_clean
from tl_vpd.forward.turns import turn
from tl_vpd.hooks import hook_points
from tl_vpd.hooks.attached_forward import AttachedForward
from tl_vpd.hooks.checked_names import check_names
from tl_vpd.importance import DecomposedWeights


class Attachment:
    """A decomposition on a model.

    Args:
        decomposition: which.
        adapter: of the model.
        sites: those that are exposed and masked.

    Attributes:
        hook_points: by site and kind.
        passes: the model's forward passes.
        user: the object that the user has (a weak reference).
    """

    def __init__(self, decomposition: DecomposedWeights, adapter: Adapter, sites: list[str]) -> None:
        self.decomposition, self.adapter, self.sites = decomposition, adapter, sites
        self.model: nn.Module = adapter.model
        self.hook_points: dict[str, dict[str, HookPoint]] = {}
        weights = CastWeights(decomposition, adapter.device, adapter.dtype)
        self.passes = AttachedForward(adapter, weights, self.hook_points)
        self.passes.owner = self
        self.user: weakref.ref[Any] | None = None
        self._change: Change[None] | None = None

    @property
    def is_on(self) -> bool:
        """Whether the model has it."""
        return attachments.attached_to(self.model) is self

    def put_on(self, kinds: Sequence[str]) -> None:
        """Puts HookPoints and taps on the model.

        Args:
            kinds: of HookPoints.
        """
        self._change = Change(partial(self._put_on, kinds), lasting=True)
        self._change.__enter__()

    def _put_on(self, kinds: Sequence[str], undo: Later) -> None:
        undo(partial(attachments.discard, self))
        attachments.add(self)
        undo(self._end)
        for name in self.sites:
            points = self.hook_points[name] = {}
            hook_points.put_on(undo, self.adapter, self.decomposition.sites[name], kinds, points)
        self.passes.taps.put_on(undo)
        for handle in self.adapter.tap_inputs(self.passes.see_tokens, self.passes.see_attention_mask):
            undo(handle.remove)
        # ``run_with_hooks`` and ``generate`` call ``forward`` past the module's hooks.
        put_attribute(undo, self.model, "forward", self.passes.forward)
        names = [self.decomposition.sites[n].hook_name(k) for n, points in self.hook_points.items() for k in points]
        check_names(undo, self.model, names, self.passes)
        copies_are_clean(undo, self.adapter)
        self.adapter.hook_points_changed()

    def _end(self) -> None:
        """The last steps of removing it, once its HookPoints are off."""
        self.passes.on = False
        self.passes.specs.clear()
        self.passes.contexts.clear()
        self.passes.taps.edits.clear()
        self.passes.weights.U.edits.clear()
        self.hook_points.clear()
        self.adapter.hook_points_changed()

    def remove(self) -> None:
        """Removes the HookPoints and taps; hooks that users put on these HookPoints go with them."""
        if self._change is not None and self.is_on:
            with turn(self.model):
                self._change.undo()

    def paused(self) -> AbstractContextManager[None]:
        """Inside, the model runs as if nothing were attached, even from a hook in the middle of a forward pass."""
        return self.passes.paused()


def remove_unused(attachment: Attachment) -> None:
    """Removes an attachment that nobody uses.

    Raises:
        ValueError: somebody does.
    """
    if attachment.passes.contexts or (attachment.user is not None and attachment.user() is not None):
        raise ValueError(
            "A decomposition is attached to this model already: detach it first, with "
            "tl_vpd.hooks.attached_to(model).detach() if you have no name for it."
        )
    attachment.remove()


def check_layers(adapter: Adapter) -> None:
    """Raises ValueError if layers of a model are those of another one that something is attached to."""
    others = [a for a in attachments.all_attachments() if a.model is not adapter.model]
    if others:
        modules = {id(module) for module in adapter.modules()}
        if any(id(module) in modules for other in others for module in other.model.modules()):
            raise ValueError(
                "This model has layers of another model that a decomposition is attached to: detach it there first, or use "
                "copy.deepcopy(model)."
            )
