"""The hook names that callers give an attached model: one that does not exist raises, with the nearest that does.

TransformerLens itself raises a bare KeyError for an unknown name in ``fwd_hooks``, or, in ``TransformerBridge`` before 4.0, runs
without the hook; a ``names_filter`` that matches nothing caches nothing. While a decomposition is attached, the model's methods
that take names stand behind a ``Checked``, put on the instance and taken off again.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from tl_vpd.adapters.caches import MaskedCache
from tl_vpd.hooks.attached_forward import AttachedForward
from tl_vpd.site import nearest

KINDS_OF_OURS = ("_component_acts", "_ci", "_mask")
METHODS = ("hooks", "run_with_hooks", "add_hook", "run_with_cache")


class Checked:
    """Stands in for a method of a model that takes hook names.

    ``own_names``: of this package's HookPoints on the model.
    """

    def __init__(self, model: nn.Module, method: str, own_names: Iterable[str], passes: AttachedForward) -> None:
        self.before = model.__dict__.get(method)
        self.plain = getattr(model, method)
        functools.update_wrapper(self, self.plain)
        self.model, self.method = model, method
        self.own_names, self.passes = frozenset(own_names), passes

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """The method, after its names have been checked."""
        self._check(*arguments, **keywords)
        if self.method != "run_with_cache":
            return self.plain(*arguments, **keywords)
        with self.passes.noting_changes() as changed:
            output, cache = self.plain(*arguments, **keywords)
        if changed and hasattr(cache, "cache_dict"):
            cache = MaskedCache(cache.cache_dict, cache.model, cache.has_batch_dim, changed)
        return output, cache

    def _check(self, *arguments: Any, **keywords: Any) -> None:
        try:
            given = inspect.signature(self.plain).bind(*arguments, **keywords).arguments
        except TypeError:
            return  # the method says it better
        given = {**given, **given.get("model_kwargs", {}), **given.get("kwargs", {})}
        if self.method == "add_hook":
            self._check_names([given["name"]])
        else:
            self._check_names([name for key in ("fwd_hooks", "bwd_hooks") for name, _ in given.get(key) or ()])
        self._check_filter(given.get("names_filter"))

    def _check_names(self, names: Iterable[Any]) -> None:
        for name in _unknown(self.model, names):
            if self.method == "add_hook" and _by_path(self.model, name):
                continue
            raise KeyError(f"This model has no hook point {name!r}{self._nearest(name)}.")

    def _check_filter(self, names_filter: Any) -> None:
        """TransformerLens's own names may be absent from a model, and a filter leaves them out; ours are a slip."""
        names = [names_filter] if isinstance(names_filter, str) else names_filter
        if not isinstance(names, list):
            return
        for name in _unknown(self.model, names):
            near = self._nearest(name)
            if any(f"{own!r}?" in near for own in self.own_names):
                raise KeyError(f"names_filter asks for {name!r}, which is no hook point of this model{near}.")

    def _nearest(self, name: str) -> str:
        ours = name.endswith(KINDS_OF_OURS)
        return nearest(name, sorted(self.own_names) if ours else self.model.hook_dict)  # type: ignore[arg-type]


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


class CheckedNames:
    """``Checked`` methods on a model. ``remove()`` takes off those that are still there."""

    def __init__(self, model: nn.Module, own_names: Iterable[str], passes: AttachedForward) -> None:
        self.model = model
        names = list(own_names)
        self.checked = {method: Checked(model, method, names, passes) for method in METHODS}
        model.__dict__.update(self.checked)

    def remove(self) -> None:
        """Puts the methods back as they were."""
        own = self.model.__dict__
        for method, checked in self.checked.items():
            if own.get(method) is not checked:
                continue  # somebody has put another in its place since
            if checked.before is None:
                del own[method]
            else:
                own[method] = checked.before
