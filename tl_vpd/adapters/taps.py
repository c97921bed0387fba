"""Torch-level hooks on modules and HookPoints. Copies of a module share them: they act in the passes of the original alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from threading import get_ident
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tl_vpd.adapters.changes import Later, change, put_attribute
from tl_vpd.adapters.versions import HookPoint

Read = Callable[[Tensor], None]
"""Is called with a site's input as the model passes it (``tl_vpd.components.Layout`` says in what shape)."""
Write = Callable[[Tensor], Tensor | None]
"""Is called with a site's output as the model passes it; returns another one, or None to leave it."""


@runtime_checkable
class Handle(Protocol):
    """Something put on a model that can be removed."""

    def remove(self) -> None:
        """Removes it."""


class Unsupported(ValueError):
    """A flag or layer type that cannot be decomposed; the message names it and the remedy."""


class OnModel:
    """Marks what this package puts on a model, so that it can be told from what others put there."""


def is_ours(value: Any) -> bool:
    """Whether a hook or attribute of a module is this package's."""
    return isinstance(value, OnModel) or isinstance(getattr(value, "__self__", None), OnModel)


class Tap(OnModel):
    """A function with its first arguments, as a torch-level hook of this package (compilers do not follow ``partial``)."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """The function's result."""
        return self.function(*self.arguments, *arguments, **keywords)

    def __deepcopy__(self, memo: Any) -> Tap:
        return self


def this_thread() -> int | None:
    """Which thread runs this (None: a compiler reads it)."""
    return None if torch.compiler.is_compiling() else get_ident()


def is_elsewhere(thread: int | None) -> bool:
    """Whether another thread than this one runs."""
    return thread is not None and not torch.compiler.is_compiling() and thread != get_ident()


class ThreadTap(Tap):
    """A tap that acts in the thread that made it; in others ``plain`` is called (None: nothing happens).

    A pass that another thread has begun on a bare model before this one took its turn may still be running.
    """

    def __init__(self, plain: Callable[..., Any] | None, function: Callable[..., Any], *arguments: Any) -> None:
        super().__init__(function, *arguments)
        self.plain, self.thread = plain, this_thread()

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """The function's result, or that of ``plain``."""
        if is_elsewhere(self.thread):
            return None if self.plain is None else self.plain(*arguments, **keywords)
        return super().__call__(*arguments, **keywords)


def put_method(undo: Later, owner: nn.Module, name: str, function: Callable[..., Any], *arguments: Any) -> None:
    """Replaces a module's method by a function with its first arguments, in passes of this thread alone."""
    put_attribute(undo, owner, name, ThreadTap(getattr(owner, name), function, *arguments))


def always() -> bool:
    """The condition of a tap that is always on."""
    return True


def _first_argument(see: Read, module: nn.Module, arguments: tuple[Any, ...]) -> None:
    see(arguments[0])


def tap_input(module: nn.Module, read: Read) -> RemovableHandle:
    """Sends a module's first argument to ``read``."""
    return module.register_forward_pre_hook(Tap(_first_argument, read))


def _changed_argument(
    change: Write, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    changed = change(arguments[0] if arguments else next(iter(keywords.values())))
    if changed is None:
        return None
    if arguments:
        return (changed, *arguments[1:]), keywords
    return arguments, {**keywords, next(iter(keywords)): changed}


def tap_argument(module: nn.Module, change: Write) -> RemovableHandle:
    """Sends a module's first argument through ``change``, after every other hook."""
    return module.register_forward_pre_hook(Tap(_changed_argument, change), with_kwargs=True)


def _keyword(
    keyword: str, see: Callable[[Any], None], module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> None:
    see(keywords.get(keyword))


def tap_keyword(module: nn.Module, keyword: str, see: Callable[[Any], None]) -> RemovableHandle:
    """Sends a keyword argument of a module (None: it is missing) to ``see``."""
    return module.register_forward_pre_hook(Tap(_keyword, keyword, see), with_kwargs=True)


def _output(write: Write, when: Callable[[], bool], module: nn.Module, arguments: Any, y: Tensor) -> Tensor | None:
    return write(y) if when() else None


def _input(
    write: Write, when: Callable[[], bool], module: nn.Module, arguments: tuple[Any, ...]
) -> tuple[Any, ...] | None:
    changed = write(arguments[0]) if when() else None
    return None if changed is None else (changed, *arguments[1:])


def tap_point(point: nn.Module, write: Write, when: Callable[[], bool] = always) -> RemovableHandle:
    """Sends what reaches a HookPoint, or the SAE in its place, through ``write`` before every hook sees it."""
    if isinstance(point, HookPoint):
        return tap_output(point, write, when)
    return point.register_forward_pre_hook(Tap(_input, write, when), prepend=True)


def tap_output(module: nn.Module, write: Write, when: Callable[[], bool] = always) -> RemovableHandle:
    """Sends a module's output through ``write`` before every other hook sees it, while ``when()`` holds."""
    return module.register_forward_hook(Tap(_output, write, when), prepend=True)


class ReadMethod(OnModel):
    """A method, replaced on an instance, that shows a tensor to readers; without readers the instance is as before."""

    name: str

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner
        self.readers: list[tuple[Any, ...]] = []

    def __deepcopy__(self, memo: Any) -> ReadMethod:
        copied = type(self)(copy.deepcopy(self.owner, memo))
        copied.readers += self.readers
        return copied


class Reader:
    """One reader of a ``ReadMethod``, which is put on its owner where it is not there yet."""

    def __init__(self, kind: type[ReadMethod], owner: nn.Module, *entry: Any) -> None:
        self.name, self.owner, self.entry = kind.name, owner, entry
        owner.__dict__.setdefault(kind.name, kind(owner)).readers.append(entry)

    def remove(self) -> None:
        """Removes the reader; after the last one, the owner's method is as before."""
        method = self.owner.__dict__.get(self.name)
        if method is not None:
            method.readers[:] = [entry for entry in method.readers if entry is not self.entry]
            if not method.readers:
                del self.owner.__dict__[self.name]


class _ReadCall(ReadMethod):
    """Calls a HookPoint and shows its output, after every hook on it, to every reader.

    A forward hook, even the last, sees the tensor before the node that torch adds for backward hooks; a gradient from a
    reader's branch would then be missing in those hooks. So the call itself is wrapped, on the instance.
    """

    name = "_call_impl"

    def __call__(self, *arguments: Any, **keywords: Any) -> Tensor:
        output = type(self.owner)._call_impl(self.owner, *arguments, **keywords)
        for read, when in self.readers:
            if when():
                read(output)
        return output


def tap_result(hook_point: nn.Module, read: Read, when: Callable[[], bool] = always) -> Reader:
    """Sends the output of a HookPoint (or of the SAE in its place), after all its hooks, to ``read`` while ``when()`` holds."""
    return Reader(_ReadCall, hook_point, read, when)


def _product(
    read: Read, write: Write, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], y: Tensor
) -> Tensor | None:
    read(arguments[0] if arguments else next(iter(keywords.values())))
    return write(y)


def tap_product(module: nn.Module, read: Read, write: Write) -> RemovableHandle:
    """Sends the argument of a module that is a product to ``read`` and its output through ``write``."""
    return module.register_forward_hook(Tap(_product, read, write), prepend=True, with_kwargs=True)


@change
def tapped(undo: Later, put_on: Callable[[], Handle]) -> None:
    """Inside, the tap that ``put_on`` puts on a model is on."""
    undo(put_on().remove)
