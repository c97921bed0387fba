"""Hook names in calls of an attached model: one that does not exist raises, with the nearest that does.

TransformerLens itself raises a bare KeyError for an unknown name in ``fwd_hooks``, or, in ``TransformerBridge`` before 4.0, runs
without the hook; a ``names_filter`` that matches nothing caches nothing. While a decomposition is attached, a ``Checked`` on
the instance replaces each of the model's methods that take names.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from torch import nn

from tl_vpd.adapters.caches import MaskedCache
from tl_vpd.adapters.changes import Change, Later, put_attribute
from tl_vpd.adapters.taps import OnModel
from tl_vpd.forward.turns import turn
from tl_vpd.hooks.attached_forward import AttachedForward
from tl_vpd.site import nearest

OUR_ENDINGS = ("_component_acts", "_ci", "_mask")
METHODS = ("hooks", "run_with_hooks", "add_hook", "run_with_cache", "reset_hooks")


class Checked(OnModel):
    """Replaces a method of a model that takes hook names; threads call it in their turn.

    Args:
        model: whose method it is.
        method: its name.
        our_names: of this package's HookPoints on the model.
        passes: notes which sites had another output than the model computed.
    """

    def __init__(self, model: nn.Module, method: str, our_names: Iterable[str], passes: AttachedForward) -> None:
        self.plain = getattr(model, method)
        functools.update_wrapper(self, self.plain)
        self.model, self.method = model, method
        self.our_names, self.passes = frozenset(our_names), passes

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """The method, after its names have been checked."""
        arguments, keywords = tuple(map(_listed, arguments)), {name: _listed(v) for name, v in keywords.items()}
        self._check(*arguments, **keywords)
        if self.method == "hooks":
            return Change(partial(self._hooks, self.plain(*arguments, **keywords)))
        with turn(self.model):
            if self.method != "run_with_cache":
                return self.plain(*arguments, **keywords)
            self.passes.refuse_other_threads()  # before its hooks are on
            with self.passes.noting_changes() as changed:
                output, cache = self.plain(*arguments, **keywords)
        if changed and hasattr(cache, "cache_dict"):
            cache = MaskedCache(cache.cache_dict, cache.model, cache.has_batch_dim, changed)
        return output, cache

    def _hooks(self, context: AbstractContextManager[Any], undo: Later) -> Any:
        """A context of hooks, as a change: their calls are one thread's alone."""
        with turn(self.model):  # another thread's pass must not set hooks aside meanwhile
            self.passes.in_context(undo, None)
            undo(partial(self._leave, context))
            return context.__enter__()

    def _leave(self, context: AbstractContextManager[Any]) -> None:
        with turn(self.model, math.inf):
            context.__exit__(None, None, None)

    def _check(self, *arguments: Any, **keywords: Any) -> None:
        try:
            bound = inspect.signature(self.plain).bind(*arguments, **keywords).arguments
        except TypeError:
            return  # the method's message is better
        bound = {**bound, **bound.get("model_kwargs", {}), **bound.get("kwargs", {})}
        if self.method == "add_hook":
            self._check_names([bound["name"]])
        else:
            self._check_names([name for key in ("fwd_hooks", "bwd_hooks") for name, _ in bound.get(key) or ()])
        self._check_filter(bound.get("names_filter"))

    def _check_names(self, names: Iterable[Any]) -> None:
        for name in _unknown(self.model, names):
            if self.method == "add_hook" and _by_path(self.model, name):
                continue
            raise KeyError(f"This model has no hook point {name!r}{self._nearest(name)}.")

    def _check_filter(self, names_filter: Any) -> None:
        """A filter may name HookPoints of TransformerLens that a model lacks; a missing one of ours is a mistake."""
        names = [names_filter] if isinstance(names_filter, str) else names_filter
        if not isinstance(names, list):
            return
        for name in _unknown(self.model, names):
            near = self._nearest(name)
            if any(f"{ours!r}?" in near for ours in self.our_names):
                raise KeyError(f"names_filter asks for {name!r}, which is not a hook point of this model{near}.")

    def _nearest(self, name: str) -> str:
        ours = name.endswith(OUR_ENDINGS)
        return nearest(name, sorted(self.our_names) if ours else self.model.hook_dict)  # type: ignore[arg-type]


def _listed(value: Any) -> Any:
    """The entries of an iterator, which can be read once only, as a list; anything else unchanged."""
    return list(value) if isinstance(value, Iterator) else value


def _unknown(model: Any, names: Iterable[Any]) -> Iterator[str]:
    """The strings among ``names`` that name no HookPoint. A bridge's aliases are looked up last: collecting them takes time."""
    missing = [name for name in names if isinstance(name, str) and name not in getattr(model, "_hook_registry", ())]
    if missing:
        known = model.hook_dict
        yield from (name for name in missing if name not in known)


def _by_path(model: Any, name: str) -> bool:
    """Whether a bridge finds the name along attributes, as its ``add_hook`` does."""
    find = getattr(type(model), "get_hook_point", None)
    return find is not None and find(model, name) is not None


def check_names(undo: Later, model: nn.Module, our_names: Iterable[str], passes: AttachedForward) -> None:
    """Puts ``Checked`` methods on a model.

    Args:
        undo: notes how to remove them.
        model: whose methods they are.
        our_names: of this package's HookPoints on the model.
        passes: notes which sites had another output than the model computed.
    """
    names = list(our_names)
    for method in METHODS:
        put_attribute(undo, model, method, Checked(model, method, names, passes))
