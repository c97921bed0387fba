"""Makes one call and says what came out: right, refused, or how it failed."""

from __future__ import annotations

import ast
import dataclasses
import functools
import math
import os
import random
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pydantic
import torch
from torch import Tensor, nn

PACKAGE = str(Path(__file__).parents[3] / "tl_vpd") + os.sep
ALLOWED = (ValueError, TypeError, LookupError, OSError, ImportError, RuntimeError, NotImplementedError)
LONGEST = 1000
"""Characters of a message; what came is cut where it is long."""


class Late(BaseException):
    """A call that does not end."""


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raises ``Late`` in the main thread after so many seconds."""

    def ring(*_: Any) -> None:
        raise Late

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome_of(call: Callable[[], Any], seconds: int) -> tuple[Any, BaseException | None]:
    """A call's result, and its exception."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with at_most(seconds):
                return call(), None
        except (Exception, Late) as error:
            return None, error


def fault_of(error: BaseException, argument: str, value: Any) -> str:
    """What is wrong with an exception; an empty string for one sentence of this package about the argument.

    Args:
        error: from the call.
        argument: its name.
        value: what came.
    """
    if isinstance(error, Late):
        return "does not end"
    if isinstance(error, pydantic.ValidationError):  # names the field, what came and what is allowed, a line each
        return "" if argument in str(error) or error.title else "does not name the argument"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{frame.filename.removeprefix(PACKAGE)}:{frame.lineno}"
    message = str(error.args[0]) if error.args else ""
    if isinstance(error, OSError) and error.strerror:
        message = error.strerror
    if not frame.filename.startswith(PACKAGE) or frame.lineno not in raising_lines(frame.filename):
        boundary = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(PACKAGE)]
        via = f" via {boundary[-1].filename.removeprefix(PACKAGE)}:{boundary[-1].lineno}" if boundary else ""
        return f"inner {type(error).__name__} at {where[-60:]}{via}: {message[:150]!r}"
    if not isinstance(error, ALLOWED):
        return f"{type(error).__name__} at {where}"
    user = str(value) if isinstance(value, str | os.PathLike) else ""
    if "\n" in message.replace(user, "") or not message.endswith((".", "?")) or len(message) > LONGEST:
        return f"no sentence at {where}: {message[:150]!r}"
    if not names_it(message, argument, value):
        return f"does not name {argument} at {where}: {message[:200]!r}"
    return ""


SYNONYMS = {
    "prompts": ("tokens", "text"),
    "prompt": ("tokens", "text"),
    "mode": ("mask",),
    "by_site": ("mask",),
    "subcomponents": ("site",),
    "node_set": ("subcomponent", "site"),
    "ablate": ("subcomponent", "site"),
    "pairs": ("subcomponent", "site"),
    "address": ("subcomponent", "site"),
    "target": ("node", "site"),
    "source": ("node", "site"),
    "path": ("file", "folder"),
    "config": ("coefficients",),
    "layer": ("blocks.",),
    "key": ("subcomponent", "site", "strengths"),
    "query": ("subcomponent", "site", "strengths"),
    "others": ("decomposition",),
    "data": ("tokens", "inputs"),
    "off_distribution": ("data",),
    "tokens": ("prompts",),
    "targets": ("token",),
    "behaviour": ("token", "target"),
    "V": ("site",),
    "gamma_tensors": ("Γ",),
}
"""What messages call an argument where its name alone would say less."""


def names_it(message: str, argument: str, value: Any) -> bool:
    """Whether a message has the argument's name, the value or the value's type."""
    text, words = message.lower(), argument.lower().replace("_", " ")
    if any(word in text for word in (argument.lower(), words, words.removesuffix("s"), *SYNONYMS.get(argument, ()))):
        return True
    if isinstance(value, str | os.PathLike) and any(
        form[:20].lower() in text for form in (str(value), repr(str(value)))
    ):
        return True
    try:
        if str(value)[:30].lower() in text:
            return True
        shown = repr(value)[:30].lower()
    except ValueError:  # it has an integer of more digits than Python prints
        shown = "digits"
    return shown in text or type(value).__name__.lower() in text


@functools.cache
def raising_lines(filename: str) -> frozenset[int]:
    """The lines of a file's ``raise`` statements."""
    tree = ast.parse(Path(filename).read_text(encoding="utf-8"))
    found = [
        range(node.lineno, (node.end_lineno or node.lineno) + 1)
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise)
    ]
    return frozenset(line for lines in found for line in lines)


def same(a: Any, b: Any) -> bool:
    """Whether two results are equal, bit for bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        numbers = [tensor.detach().nan_to_num(7e7) for tensor in (a, b)]
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(*numbers)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and np.array_equal(a, b)
    if isinstance(a, pd.DataFrame | pd.Series):
        return type(a) is type(b) and a.equals(b)
    if isinstance(a, float) and isinstance(b, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    if isinstance(a, nn.Module):
        return type(a) is type(b) and same(dict(a.state_dict()), dict(b.state_dict()))
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if type(a).__eq__ is object.__eq__:
        return type(a) is type(b) and same(getattr(a, "__dict__", {}), getattr(b, "__dict__", {}))
    return bool(a == b)


def state_of(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """All that a call must leave as it was.

    Args:
        model: the target.
        tensors: those that the calls get, by name.
    """
    modules = list(model.named_modules())
    return {
        "hooks": [
            (
                name,
                len(m._forward_hooks),
                len(m._forward_pre_hooks),
                len(m._backward_hooks),
                len(getattr(m, "fwd_hooks", ())),
            )
            for name, m in modules
        ],
        "attributes": [(name, sorted(set(m.__dict__))) for name, m in modules],
        "flags": [(name, m.training) for name, m in modules],
        "parameters": [(n, p.requires_grad, p.grad is None, p.detach().clone()) for n, p in model.named_parameters()],
        "tensors": {name: t.detach().clone() for name, t in tensors.items()},
        "torch": (torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_inference_mode_enabled()),
        "other generators": [hash(random.getstate()), np.random.get_state()[1].tobytes()],
        "filters": len(warnings.filters),
        "stdout": id(sys.stdout),
    }


def difference(before: dict[str, Any], after: dict[str, Any]) -> str:
    """The first entry in which two states differ."""
    return next((key for key in before if not same(before[key], after[key])), "")
