"""Torch-level hooks on modules and HookPoints: bound methods and ``partial``s, which survive ``deepcopy``; closures would not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformer_lens.hook_points import HookPoint

Read = Callable[[Tensor], None]
"""Takes a site's input ``[batch, pos, d_in]``."""
Write = Callable[[Tensor], Tensor | None]
"""Takes a site's output ``[batch, pos, d_out]`` and gives it back changed, or None for unchanged."""


@runtime_checkable
class Handle(Protocol):
    """Something put on a model that can be taken off."""

    def remove(self) -> None:
        """Takes it off."""


class Unsupported(ValueError):
    """A flag or layer type that cannot be decomposed; the message names it and the remedy."""


def first_argument(see: Callable[[Tensor], None], module: nn.Module, arguments: tuple[Any, ...]) -> None:
    see(arguments[0])


def keyword_argument(
    keyword: str, see: Callable[[Any], None], module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> None:
    see(keywords.get(keyword))


def qkv_input(
    keyword: str, read: Read, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> None:
    x = keywords[keyword]
    if x.ndim != 3:
        raise Unsupported(
            f"{keyword} has a head axis ({tuple(x.shape)}): switch off use_split_qkv_input and use_attn_in on the model."
        )
    read(x)


def _flattened_output(write: Write, heads: bool, module: nn.Module, arguments: Any, y: Tensor) -> Tensor | None:
    changed = write(y.flatten(2) if heads else y)
    return None if changed is None else changed.view_as(y)


def tap_output(module: nn.Module, write: Write, *, heads: bool = False) -> RemovableHandle:
    return module.register_forward_hook(partial(_flattened_output, write, heads), prepend=True)


class _TappedCall:
    """Calls a HookPoint and shows what it hands on to every reader, after every hook on it.

    A forward hook, even the last, sees the tensor before the node that torch adds for backward hooks; what a reader's branch
    sends back would then be missing from the gradients those are shown. So the call itself is wrapped, on the instance.
    """

    def __init__(self, hook_point: HookPoint) -> None:
        self.hook_point = hook_point
        self.readers: list[Read] = []

    def __call__(self, *arguments: Any, **keywords: Any) -> Tensor:
        output = type(self.hook_point)._call_impl(self.hook_point, *arguments, **keywords)
        for read in self.readers:
            read(output.flatten(2))
        return output


class _ResultTap:
    """One reader of a HookPoint's result."""

    def __init__(self, hook_point: HookPoint, read: Read) -> None:
        self.hook_point, self.read = hook_point, read
        call = hook_point.__dict__.setdefault("_call_impl", _TappedCall(hook_point))
        call.readers.append(read)

    def remove(self) -> None:
        """Takes the reader off; without any, the HookPoint's own call is back."""
        call = self.hook_point.__dict__.get("_call_impl")
        if call is None:
            return
        call.readers[:] = [read for read in call.readers if read is not self.read]
        if not call.readers:
            del self.hook_point.__dict__["_call_impl"]


def tap_result(hook_point: HookPoint, read: Read) -> _ResultTap:
    """Sends what the HookPoint hands on, heads flattened, to ``read``."""
    return _ResultTap(hook_point, read)
