"""An accelerator made in Python: tensors that are on a device of their own, whose numbers a CPU computes.

PyTorch lets Python stand in for a device (``PrivateUse1``). Tensors on it refuse what a GPU refuses, and note what makes a GPU's
caller wait, with the line of the package that asked for it:

- an operation on tensors of two devices raises, except copies, and numbers (tensors without axes) as everywhere in PyTorch;
- a number read on the CPU, indices found by value (``nonzero``, a mask as an index), copies from and to the CPU are waits: a copy
  from memory that is not pinned, as of ``torch.tensor(x, device=...)``, waits for all that was started before it;
- a tensor made on the CPU inside ``watched`` is noted.

It is registered once in a process, before the first backward, and stays: import this module in a process of its own.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "toygpu"
aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}
BY_VALUE = {
    aten._local_scalar_dense.default: "item",
    aten.equal.default: "equal",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten._unique2.default: "unique",
    aten.unique_dim.default: "unique",
    aten.unique_consecutive.default: "unique",
    aten.bincount.default: "bincount",
    aten.repeat_interleave.Tensor: "repeat_interleave",
    aten.linalg_eigh.default: "eigh",
    aten._linalg_eigh.default: "eigh",
    aten._linalg_svd.default: "svd",
}
"""Operations that a GPU's caller waits for, as what their result is depends on numbers."""
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


@dataclass
class Seen:
    """What was noted: each kind of wait, and each operator that made a tensor on the CPU, with its line, and how often."""

    waits: Counter[str] = field(default_factory=Counter)
    on_cpu: Counter[str] = field(default_factory=Counter)
    operators: int = 0


_watching: list[Seen] = []


@contextmanager
def watched() -> Iterator[Seen]:
    """Inside, waits and tensors on the CPU are noted."""
    seen = Seen()
    _watching.append(seen)
    try:
        with _OnCPU(seen):
            yield seen
    finally:
        _watching.remove(seen)


class OnDevice(Tensor):
    """A tensor on the accelerator; ``inner`` holds its numbers."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )
        made.inner = inner
        return made

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        _note(func, args, kwargs)
        _refuse_two_devices(func, args, kwargs)
        to = kwargs.get("device")
        if to is not None:
            kwargs["device"] = torch.device("cpu")
        inner_args, inner_kwargs = pytree.tree_map(_inner, (args, kwargs))
        out = func(*inner_args, **inner_kwargs)
        if to is not None and torch.device(to).type == "cpu":
            return out
        if func is aten.copy_.default and not isinstance(args[0], OnDevice):
            return args[0]
        for t in pytree.tree_leaves((args, kwargs)):
            assert not isinstance(t, OnDevice) or t.shape == t.inner.shape, f"{func} resizes, which is not made"
        out = pytree.tree_map(lambda t: OnDevice(t) if isinstance(t, Tensor) else t, out)
        return return_and_correct_aliasing(func, args, kwargs, out)


class _OnCPU(TorchDispatchMode):
    """Notes operators whose tensors are all on the CPU."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.seen.operators += 1
        tensors = [t for t in pytree.tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        if tensors and not any(isinstance(t, OnDevice) for t in tensors):
            self.seen.on_cpu[f"{func} {_line()}"] += 1
        return out


class Generator(torch._C.Generator):
    """A generator of the accelerator: its numbers are a CPU's of the same seed."""

    device: Any = None  # set by ``register``: before it there is no such device

    def __new__(cls, device: Any = "cpu") -> Any:
        if torch.device(device).type != NAME:
            return torch._C.Generator(device)
        return super().__new__(cls, "cpu")


class _Module:
    """What ``torch.toygpu`` is."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None: ...

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, OnDevice) else value


def _note(func: Any, args: Any, kwargs: Any) -> None:
    kind = BY_VALUE.get(func)
    if func in COPIES:
        source = args[1] if func is aten.copy_.default else args[0]
        target = args[0].device if func is aten.copy_.default else kwargs.get("device") or source.device
        kind = None if torch.device(target).type == source.device.type else f"copy to {torch.device(target).type}"
        if kwargs.get("non_blocking") or (func is aten.copy_.default and any(args[2:])):
            kind = None if isinstance(target, torch.device) and target.type == NAME else kind  # from pinned memory
    if func in INDEXING:
        by_value = any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
        filled = func is not aten.index.Tensor and args[2].numel() == 1
        on_cpu = any(t is not None and not isinstance(t, OnDevice) for t in args[1])
        kind = "mask as an index" if by_value and not filled else "index on the CPU" if on_cpu else None
    if kind is not None:
        for seen in _watching:
            seen.waits[f"{kind} {_line()}"] += 1


def _refuse_two_devices(func: Any, args: Any, kwargs: Any) -> None:
    if func in COPIES or func in INDEXING:
        return
    elsewhere = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and not isinstance(t, OnDevice)]
    if any(t.ndim for t in elsewhere):
        raise RuntimeError(f"{func}: tensors on the CPU and on {NAME} at {_line()}.")


def _line() -> str:
    """The innermost line of the package that is running."""
    frame = sys._getframe()
    while frame is not None:
        name = frame.f_code.co_filename
        if "/tl_vpd/" in name:
            return f"{name.rpartition('/tl_vpd/')[2]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return f"elsewhere ({threading.current_thread().name})"


def register() -> None:
    """Makes the accelerator known to PyTorch."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    for name in ("AutocastPrivateUse1",):
        library = torch.library.Library("_", "IMPL")
        library.fallback(torch.library.fallthrough_kernel, name)
        _kept.append(library)
    kernels = torch.library.Library("aten", "IMPL")
    kernels.impl("empty.memory_format", _empty, "PrivateUse1")
    kernels.impl("empty_strided", _empty_strided, "PrivateUse1")
    kernels.impl("_copy_from", _copy_from, "PrivateUse1")
    for name in (
        "eye",
        "arange",
        "arange.start",
        "arange.start_step",
        "randperm.generator",
        "tril_indices",
        "triu_indices",
    ):
        kernels.impl(name, partial(_made, getattr(torch, name.partition(".")[0])), "PrivateUse1")
    _kept.append(kernels)
    Generator.device = torch.device(NAME, 0)
    torch.Generator = Generator  # type: ignore[misc]
    Tensor.pin_memory = lambda tensor, *_: tensor  # type: ignore[method-assign]
    torch.__future__.set_swap_module_params_on_conversion(True)


_kept: list[Any] = []


def _empty(
    size: Any,
    *,
    dtype: Any = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
    memory_format: Any = None,
) -> Tensor:
    return OnDevice(torch.empty(size, dtype=dtype, memory_format=memory_format))


def _empty_strided(
    size: Any, stride: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None
) -> Tensor:
    return OnDevice(torch.empty_strided(size, stride, dtype=dtype))


def _made(function: Any, *arguments: Any, device: Any = None, pin_memory: Any = None, **options: Any) -> Tensor:
    """A factory whose general form resizes a tensor."""
    return OnDevice(function(*arguments, **options))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """A copy below what Python sees, as ``torch.as_tensor(number, device=...)`` makes."""
    _note(aten.copy_.default, (target, source), {})
    _inner(target).copy_(_inner(source))
    return target


register()
