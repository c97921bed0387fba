"""A model's unembedding: the product by itself, and the model without it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tl_vpd.adapters.changes import Later, change
from tl_vpd.adapters.taps import put_method
from tl_vpd.losses import Unembedding


def unembedding_of(module: Any) -> Unembedding | None:
    """What a TransformerLens unembedding does (None: it is another kind of module, or somebody hooks it)."""
    W, b = getattr(module, "W_U", None), getattr(module, "b_U", None)
    if not isinstance(W, Tensor) or _hooked(module):
        return None
    return Unembedding(W.detach().T, b.detach() if isinstance(b, Tensor) else None)


def _hooked(module: nn.Module) -> bool:
    """Whether anything stands on a module or on one of its HookPoints."""
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in module.modules())


@change
def without(undo: Later, module: nn.Module) -> None:
    """Inside, a module returns its input."""
    put_method(undo, module, "forward", _identity)


def _identity(x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
    return x
