"""What this package puts on a model: removed where nobody else will, and left out of copies.

An attachment that was interrupted at the worst moment, or a copy of a part of an attached model, has taps and HookPoints that
belong to nothing. They do nothing, but would be in the way of the next attachment.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn

from tl_vpd.adapters import Adapter
from tl_vpd.adapters.changes import Later, put_attribute
from tl_vpd.adapters.taps import OnModel, Tap, is_ours
from tl_vpd.forward.turns import turn

MARK = "_of_a_decomposition"
"""The attribute that tells this package's HookPoints from others."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
HOOK_FLAGS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")


def clear(modules: Iterable[nn.Module]) -> bool:
    """Removes all that this package has put on modules; whether there was anything."""
    found = False
    for module in modules:
        attributes = module.__dict__
        for name, value in list(attributes.items()):
            if is_ours(value):
                del attributes[name]
                attributes.update(_before(name, value))
                found = True
        for hooks in (attributes[name] for name in HOOKS):
            for key in [key for key, hook in hooks.items() if is_ours(hook)]:
                for name in (*HOOKS, *HOOK_FLAGS):
                    attributes.get(name, {}).pop(key, None)
                found = True
        for name in [name for name, child in module._modules.items() if child is not None and MARK in child.__dict__]:
            del module._modules[name]
            found = True
    return found


def _before(name: str, value: Any) -> dict[str, Any]:
    """The attribute that one of ours hides: a user's; a method of the class needs none."""
    plain = getattr(getattr(value, "__self__", value), "plain", None)
    if plain is None or isinstance(getattr(plain, "__self__", None), nn.Module):
        return {}
    return _before(name, plain) if is_ours(plain) else {name: plain}


def copies_are_clean(undo: Later, adapter: Adapter) -> None:
    """Lets ``copy.deepcopy``, ``pickle`` and ``torch.save`` of an attached model give the model as if nothing were attached.

    Args:
        undo: notes how to end that.
        adapter: of the model.
    """
    if is_ours(adapter.model.__dict__.get("__deepcopy__")):
        return
    copied = CleanCopy(adapter)
    put_attribute(undo, adapter.model, "__deepcopy__", copied)
    put_attribute(undo, adapter.model, "__reduce_ex__", Tap(copied.reduced))


class CleanCopy(OnModel):
    """Copies an attached model without what is attached.

    Args:
        adapter: of the model.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter

    def __call__(self, memo: dict[int, Any]) -> Any:
        """A deep copy of the model."""
        model: Any = self.adapter.model
        with turn(model):
            new = memo[id(model)] = model.__class__.__new__(model.__class__)
            state = {name: value for name, value in model.__dict__.items() if not is_ours(value)}
            for name, value in model.__dict__.items():
                if is_ours(value):
                    state.update(_before(name, value))
            new.__setstate__(copy.deepcopy(state, memo))
        adapter = copy.copy(self.adapter)
        adapter.model = new
        if clear(adapter.modules()):
            adapter.hook_points_changed()
        return new

    def reduced(self, protocol: int) -> Any:
        """What ``pickle`` writes: a copy that has the model's tensors."""
        memo: dict[int, Any] = {}
        for module in self.adapter.modules():
            memo.update({id(t): t for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))})
        return self(memo).__reduce_ex__(protocol)
