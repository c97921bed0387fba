"""Internal runs of a model: in eval mode, its weights without gradients, users' hooks set aside."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from tl_vpd.adapters import Adapter
from tl_vpd.adapters.changes import Later, change, enter


@change
def in_eval_mode(undo: Later, adapter: Adapter) -> None:
    """Inside, every module is in eval mode, so that dropout leaves activations and random generators alone."""
    training = [m for m in adapter.modules() if m.training]
    undo(partial(_set_training, training, True))
    _set_training(training, False)


def _set_training(modules: Sequence[nn.Module], training: bool) -> None:
    for module in modules:
        module.training = training


@change
def frozen(undo: Later, adapter: Adapter) -> None:
    """Inside, the model is in eval mode and its weights have no gradients; both are restored afterwards."""
    parameters = [(p, p.requires_grad) for m in adapter.modules() for p in m.parameters(recurse=False)]

    def restore() -> None:
        for p, flag in parameters:
            p.requires_grad_(flag)

    enter(undo, in_eval_mode(adapter))
    undo(restore)
    for p, _ in parameters:
        p.requires_grad_(False)


@change
def users_hooks_aside(undo: Later, adapter: Adapter) -> None:
    """Sets aside every HookPoint's hooks that are not permanent, and restores the same dictionaries afterwards.

    A clean pass must see the target, not the user's patches. Hooks on other modules (the decomposition's taps among them)
    are left alone.
    """
    saved: list[tuple[nn.Module, dict[int, Any], dict[int, Any]]] = []

    def restore() -> None:
        for module, forward, backward in saved:
            module._forward_hooks, module._backward_hooks = forward, backward

    undo(restore)
    for module in adapter.modules():
        handles = [*getattr(module, "fwd_hooks", ()), *getattr(module, "bwd_hooks", ())]
        transient = {h.hook.id for h in handles if not h.is_permanent}
        if transient:
            forward, backward = module._forward_hooks, module._backward_hooks
            saved.append((module, forward, backward))
            module._forward_hooks = OrderedDict((k, f) for k, f in forward.items() if k not in transient)
            module._backward_hooks = OrderedDict((k, f) for k, f in backward.items() if k not in transient)
