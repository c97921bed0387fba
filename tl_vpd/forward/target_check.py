"""Whether a model is the target of a decomposition: the same sites, the same shapes, the same weights.

Every function of a decomposition and a model checks this first, since Δ and importances of other weights mean nothing:

    >>> check_target(decomposition, adapt(model))     # doctest: +SKIP

Fingerprints of a model's weights are computed once and remembered until a parameter is replaced or written to
(torch does not count writes through ``parameter.data``). A model that was
accepted (``vpd.attach(model, check_weights=False)``) is not checked again for that decomposition.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from tl_vpd.adapters import Adapter
from tl_vpd.checks import flag
from tl_vpd.components import Components, Fingerprint
from tl_vpd.components.fingerprint import TOLERANCE
from tl_vpd.importance import DecomposedWeights
from tl_vpd.site import nearest

Mark = tuple["weakref.ref[nn.Parameter]", int, int]
"""A parameter, where its numbers lie, and how often it was written to."""


@dataclass
class _Remembered:
    """The fingerprints of one model by site, and the state of its parameters that they belong to."""

    marks: list[Mark] = field(default_factory=list)
    processed: bool = False
    by_site: dict[str, Fingerprint] = field(default_factory=dict)


_remembered: weakref.WeakKeyDictionary[nn.Module, _Remembered] = weakref.WeakKeyDictionary()
_accepted: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[DecomposedWeights]] = weakref.WeakKeyDictionary()


def check_decomposition(weights: object) -> None:
    """Raises TypeError unless an argument is a decomposition (or bare ``Components``)."""
    if not isinstance(weights, DecomposedWeights | Components):
        raise TypeError(f"The decomposition is a {type(weights).__name__}: give a tl_vpd.Decomposition.")


def check_target(weights: DecomposedWeights | Components, adapter: Adapter, *, check_weights: bool = True) -> None:
    """Raises unless the model has the sites, shapes and weights that were decomposed.

    Bare ``Components`` do not know what they were made from: of them only sites and shapes are compared.

    Args:
        weights: the decomposition.
        adapter: of the model.
        check_weights: whether weights are compared; sites and shapes always are.

    Raises:
        TypeError: ``weights`` is something else, or ``check_weights`` not True or False.
        ValueError: a site is missing, has another shape or other weights; the message gives the size of the mismatch.
    """
    check_decomposition(weights)
    flag("check_weights", check_weights)
    for name, site in weights.sites.items():
        other = adapter.sites.get(name)
        if other is None:
            reason = adapter.refused.get(name) or adapter.refused.get(name.rpartition(".")[0])
            raise ValueError(
                f"This model has no {name} that can be decomposed: {reason}."
                if reason
                else f"This model has no {name}{nearest(name, adapter.sites)}: the decomposition is of another model."
            )
        if (site.d_in, site.d_out) != (other.d_in, other.d_out):
            raise ValueError(
                f"{name} is {other.d_in}x{other.d_out} in this model and {site.d_in}x{site.d_out} in the decomposition: it "
                "is of another model."
            )
    if not check_weights or isinstance(weights, Components) or weights in _accepted.get(adapter.model, ()):
        return
    model = fingerprints(adapter, weights.sites)
    sizes = {name: stored.mismatch(model[name]) for name, stored in weights.fingerprints.items()}
    differ = {name: size for name, size in sizes.items() if not size <= TOLERANCE}
    if differ:
        largest = max(differ, key=lambda name: differ[name])
        raise ValueError(
            f"This model's weights are not the decomposed ones: {len(differ)} of {len(weights.sites)} sites differ, {largest} "
            f"by {differ[largest]:.3g} (allowed {TOLERANCE}). {_processing(weights, adapter)}Load the model with the settings "
            "the decomposition was made with (fold_ln, center_writing_weights, enable_compatibility_mode and so on), or "
            "accept this model with vpd.attach(model, check_weights=False)."
        )


def accept_target(weights: DecomposedWeights, model: nn.Module) -> None:
    """From now on ``check_target`` accepts this model for this decomposition, with any weights."""
    _accepted.setdefault(model, weakref.WeakSet()).add(weights)


def fingerprints(adapter: Adapter, names: Iterable[str]) -> dict[str, Fingerprint]:
    """Fingerprints of a model's weights by site, computed once for each state of the model's parameters.

    Args:
        adapter: of the model.
        names: of the sites.
    """
    remembered = _remembered.setdefault(adapter.model, _Remembered())
    parameters = {id(p): p for module in adapter.modules() for p in module.parameters(recurse=False)}
    if remembered.processed != adapter.processed or not _unchanged(remembered.marks, parameters.values()):
        tracked = not any(p.is_inference() for p in parameters.values())  # such a tensor does not count its changes
        remembered.marks = [(weakref.ref(p), p.data_ptr(), p._version) for p in parameters.values()] if tracked else []
        remembered.processed = adapter.processed
        remembered.by_site.clear()
    for name in names:
        if name not in remembered.by_site:
            remembered.by_site[name] = Fingerprint.of(adapter.weight(name))
    return {name: remembered.by_site[name] for name in names}


def _unchanged(marks: list[Mark], parameters: Iterable[nn.Parameter]) -> bool:
    parameters = list(parameters)
    return len(marks) == len(parameters) and all(
        p is ref() and p.data_ptr() == address and p._version == version
        for (ref, address, version), p in zip(marks, parameters, strict=True)
    )


def _processing(weights: DecomposedWeights, adapter: Adapter) -> str:
    """What of the weights' processing is known to differ, as a sentence."""
    decomposed: dict[str, bool] = weights.record.get("target", {}).get("processing", {})
    model = adapter.processing()
    differ = [flag for flag in decomposed if flag in model and decomposed[flag] != model[flag]]
    if not differ:
        return ""
    was, is_now = (", ".join(f"{flag}={flags[flag]}" for flag in differ) for flags in (decomposed, model))
    return f"They look processed differently: the decomposition was made with {was}, this model has {is_now}. "
