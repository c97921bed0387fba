"""An edit written into the weights of a model, whole or not at all, and undone exactly.

    >>> baked = bake(edit, model)                   # doctest: +SKIP
    >>> model.save_pretrained("edited")             # of transformers     # doctest: +SKIP
    >>> baked.undo()                                # doctest: +SKIP

The model may be the one that was decomposed, of either of TransformerLens's classes, or the model of transformers behind it:
there, fused and grouped weights are found, and norms that were folded in are translated back (``tl_vpd.adapters.unfolded``).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tl_vpd.adapters import Adapter, adapt
from tl_vpd.adapters.changes import Change, Later, Uninterrupted
from tl_vpd.adapters.plain import PlainWeights
from tl_vpd.adapters.unfolded import already, stored_change
from tl_vpd.adapters.versions import HookedRootModule, is_bridge
from tl_vpd.checks import flag, instance
from tl_vpd.components import Fingerprint
from tl_vpd.components.fingerprint import TOLERANCE
from tl_vpd.editing.edit import Edit
from tl_vpd.files.tensor_file import digest_of
from tl_vpd.forward.attachments import attached_to

_baked: weakref.WeakKeyDictionary[nn.Module, Edit] = weakref.WeakKeyDictionary()
"""The edit that a model has in its weights now."""


@dataclass(frozen=True, eq=False)
class Slot:
    """One tensor of a model, that a bake replaces.

    Attributes:
        name: for messages.
        read: gives the tensor.
        write: replaces its numbers, in place.
        before: a copy of the numbers, on the CPU.
        after: the numbers with the edit, on the CPU.
    """

    name: str
    read: Callable[[], Tensor]
    write: Callable[[Tensor], None]
    before: Tensor = field(repr=False)
    after: Tensor = field(repr=False)

    @classmethod
    def of(cls, name: str, read: Callable[[], Tensor], write: Callable[[Tensor], None], change: Tensor) -> Slot:
        """A slot whose numbers are to change; raises ValueError if they would not be finite."""
        before = _copy(read())
        after = (before.double() + change).to(before.dtype)
        if not bool(after.isfinite().all()):
            raise ValueError(f"With the edit, {name} would have values beyond {before.dtype}: nothing was written.")
        return cls(name, read, write, before, after)


class Baked:
    """An edit that is in a model's weights.

    Attributes:
        edit: which.
        changed: the names of the weights and biases that differ now.
    """

    def __init__(self, edit: Edit, model: nn.Module, slots: list[Slot]) -> None:
        self.edit, self.changed = edit, [slot.name for slot in slots]
        self._model = weakref.ref(model)
        self._slots = slots
        self._digests = [(digest_of(s.name, s.before), digest_of(s.name, s.after)) for s in slots]

    def undo(self) -> None:
        """Restores the weights from the copy that was made before the edit, to the bit.

        Raises:
            RuntimeError: it has been undone, or the model is gone.
            ValueError: the weights have changed since, or the copy has.
        """
        model = self._model()
        if model is None or model not in _baked or _baked[model] is not self.edit:
            raise RuntimeError("This edit is not in the model's weights any more: it has been undone.")
        for slot, (before, after) in zip(self._slots, self._digests, strict=True):
            if digest_of(slot.name, _copy(slot.read())) != after:
                raise ValueError(
                    f"{slot.name} has changed since the edit was baked, and undoing would lose that: bake edit.inverse() with "
                    "check_weights=False, which keeps it."
                )
            if digest_of(slot.name, slot.before) != before:
                raise ValueError(f"The copy of {slot.name} has changed since the edit was baked: load the model again.")
        with Uninterrupted():
            for slot in self._slots:
                slot.write(slot.before)
            del _baked[model]

    def __repr__(self) -> str:
        model = self._model()
        where = "a model that is gone" if model is None else f"a {type(model).__name__}"
        return f"Baked into {where}: {', '.join(self.changed)}\n{self.edit}"


@torch.no_grad()
def bake(edit: Edit, model: nn.Module, *, check_weights: bool = True) -> Baked:
    """Writes an edit into a model's weights, which from then on is an ordinary model.

    Either every weight is written or, after an error or Ctrl-C, none.

    Args:
        edit: of the decomposition of this model.
        model: a HookedTransformer, TransformerBridge or custom HookedRootModule as it was decomposed, or the model of
            transformers.
        check_weights: refuse a model with other weights than the decomposed ones, and one that has the edit already.

    Returns:
        What can ``undo`` it. It has a copy of the weights that were changed.

    Raises:
        TypeError: an argument is of another type.
        ValueError: the weights are not the decomposed ones, have the edit already or another one that was not undone, the
            processing cannot be translated back, or a decomposition is attached to the model; the weights are untouched.
    """
    instance("edit", edit, Edit)
    flag("check_weights", check_weights)
    if not isinstance(model, nn.Module):
        raise TypeError(f"The model is a {type(model).__name__}: give the model that the edit is for.")
    if model in _baked:
        raise ValueError("This model has an edit in its weights already: undo it first, or bake the sum of both edits.")
    if attached_to(model) is not None:
        raise ValueError("A decomposition is attached to this model: leave that context or detach it, then bake.")
    slots = _slots(edit, model, check_weights)
    baked = Baked(edit, model, slots)
    Change(partial(_write_all, edit, model, slots), lasting=True).__enter__()
    return baked


def _write_all(edit: Edit, model: nn.Module, slots: list[Slot], undo: Later) -> None:
    undo(partial(_baked.pop, model, None))
    _baked[model] = edit
    for slot in slots:
        undo(partial(slot.write, slot.before))
        slot.write(slot.after)


def _slots(edit: Edit, model: nn.Module, check_weights: bool) -> list[Slot]:
    """What is to be written, computed before anything is."""
    hooked = isinstance(model, HookedRootModule) or is_bridge(model)
    weights: Any = adapt(model) if hooked else PlainWeights(model)
    slots: list[Slot] = []
    for site in edit.sites:
        delta = edit.delta(site)
        if isinstance(weights, Adapter) and site not in weights.sites:
            raise ValueError(f"This {type(model).__name__} has no {site}: the edit is of another model.")
        W = weights.weight(site)
        if W.shape != delta.shape:
            raise ValueError(f"{site} is {tuple(W.shape)} in this model and {tuple(delta.shape)} in the edit.")
        bias = None
        if check_weights and isinstance(weights, PlainWeights):
            delta, bias = stored_change(weights, site, delta, edit.fingerprints, edit.processing)
        elif check_weights:
            _check_weight(edit, site, W)
        slots.append(Slot.of(site, partial(weights.weight, site), partial(weights.set_weight, site), delta))
        if bias is not None:
            name = f"the bias of {site}"
            slots.append(Slot.of(name, partial(weights.bias, site), partial(weights.set_bias, site), bias))
    return slots


def _check_weight(edit: Edit, site: str, W: Tensor) -> None:
    """Raises ValueError unless a weight is the decomposed one."""
    if edit.fingerprints[site].shows_change(W, edit.delta(site)):
        raise ValueError(already(site))
    size = edit.fingerprints[site].mismatch(Fingerprint.of(W))
    if not size <= TOLERANCE:
        raise ValueError(
            f"{site} of this model is not the decomposed weight: it differs by {size:.3g} (allowed {TOLERANCE}). Load the model "
            "with the settings the decomposition was made with, or bake with check_weights=False."
        )


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to(device="cpu", copy=True, memory_format=torch.contiguous_format)
