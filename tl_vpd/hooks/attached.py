"""A model with a decomposition attached: HookPoints for what subcomponents do, and masked modes.

Every block of the model has HookPoints ``blocks.{i}.hook_{site}_{what}``, with site ``q k v o in gate out``:

``component_acts``  ``x @ V``, [batch, pos, C]; patch it and the site's output follows
``ci``              causal importances on this input, [batch, pos, C]
``mask``            the factor of each subcomponent, [batch, pos, C]
``delta_mask``      the factor of Δ, [batch, pos, 1]

Nothing is computed for a HookPoint that nobody listens to; with no listener and no mode the model is itself.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from tl_vpd.adapters import adapt
from tl_vpd.adapters.changes import Later, enter
from tl_vpd.checks import choice
from tl_vpd.forward import SiteEdit, attachments
from tl_vpd.forward.remains import clear
from tl_vpd.forward.target_check import accept_target, check_decomposition, check_target
from tl_vpd.forward.turns import turn, turns_of
from tl_vpd.hooks import hook_points
from tl_vpd.hooks.ablations import FwdHooks, Subcomponents, ablation_hooks, indices_by_site
from tl_vpd.hooks.attachment import Attachment, check_layers, remove_unused
from tl_vpd.hooks.hook_points import KINDS
from tl_vpd.hooks.inside import Inside
from tl_vpd.hooks.mask_spec import MaskFunction, MaskSpec
from tl_vpd.hooks.positions import Positions
from tl_vpd.importance import DecomposedWeights
from tl_vpd.masking import Masks, SiteMask
from tl_vpd.masking.modes import Mode, ModeKeywords, ModeOptions
from tl_vpd.site import select


@runtime_checkable
class ChangesSites(Protocol):
    """An edit of weights, as ``tl_vpd.editing`` makes them."""

    def site_edits(self, decomposition: DecomposedWeights) -> Mapping[str, SiteEdit]:
        """The changes by site; raises ValueError if they are of another decomposition."""


def attached_to(model: nn.Module) -> Attached | None:
    """What is attached to this model, if anything; raises TypeError if it is not a model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"The model is a {type(model).__name__}: give a HookedTransformer or a TransformerBridge.")
    attachment = attachments.attached_to(model)
    return None if attachment is None else Attached.of(cast(Attachment, attachment))


def attachment_of(decomposition: DecomposedWeights, model: nn.Module) -> Attached | None:
    """This decomposition's attachment to this model, if it is attached; raises ValueError if another one is."""
    check_decomposition(decomposition)
    attached = attached_to(model)
    if attached is not None and attached.decomposition is not decomposition:
        raise ValueError("Another decomposition is attached to this model: detach it first.")
    return attached


class Attached:
    """A decomposition on a model. A context manager; ``detach()`` or leaving it restores the model.

    Args:
        decomposition: V and U are used in the model's dtype and on its device; gradients reach them wherever they are.
        model: a HookedTransformer, a TransformerBridge, or a HookedRootModule with ``nn.Linear`` layers.
        sites: patterns of the sites to expose and mask (None: all).
        hooks: which of ``component_acts``, ``ci``, ``mask``, ``delta_mask`` get HookPoints.
        check_weights: refuse a model with other weights than the decomposed ones. A model attached without this check counts as
            accepted for this decomposition: no function compares its weights again.

    Raises:
        ValueError: the weights differ (the message gives the size of the mismatch), a flag is not supported, or a decomposition
            is attached already.
        KeyError: a site pattern or hook kind matches nothing.
    """

    def __init__(
        self,
        decomposition: DecomposedWeights,
        model: nn.Module,
        *,
        sites: str | Sequence[str] | None = None,
        hooks: str | Sequence[str] = KINDS,
        check_weights: bool = True,
    ) -> None:
        kinds = hook_points.check_kinds(hooks)
        alone = turns_of(model).owner is not threading.current_thread()
        with turn(model):
            if (other := attachments.attached_to(model)) is not None:
                remove_unused(cast(Attachment, other))
            adapter = adapt(model)
            check_layers(adapter)
            if alone and clear(adapter.modules()):  # what an interrupt has left, or the copy of a part
                adapter.hook_points_changed()
            check_target(decomposition, adapter, check_weights=check_weights)
            if not check_weights:
                accept_target(decomposition, model)
            self._become(Attachment(decomposition, adapter, select(sites, decomposition.sites)))
            self._attachment.put_on(kinds)

    @classmethod
    def of(cls, attachment: Attachment) -> Attached:
        """The user's object of what is on a model."""
        attached = None if attachment.user is None else attachment.user()
        if attached is None:
            attached = cls.__new__(cls)
            attached._become(attachment)
        return attached

    def _become(self, attachment: Attachment) -> None:
        self._attachment, self._forward = attachment, attachment.passes
        self.decomposition, self.model, self.adapter = attachment.decomposition, attachment.model, attachment.adapter
        self.sites, self.hook_points = attachment.sites, attachment.hook_points
        attachment.user = weakref.ref(self)

    def detach(self) -> None:
        """Removes the HookPoints and taps; hooks that users put on these HookPoints go with them."""
        self._attachment.remove()

    _entered = False

    def __enter__(self) -> Attached:
        self._entered = True
        return self

    def __exit__(self, *exception: Any) -> None:
        self.detach()
        self._entered = False

    def __del__(self) -> None:
        if self._entered and not sys.is_finalizing():  # interrupted while leaving
            self.detach()

    def __reduce__(self) -> Any:
        raise TypeError("An attachment cannot be copied or pickled: copy model and decomposition, and attach again.")

    # -- modes -----------------------------------------------------------------------------------------------------

    def masked(
        self,
        mode: Mode | str | Mapping[str, SiteMask | Tensor] | MaskFunction,
        *,
        sites: str | Sequence[str] | None = None,
        pos: Positions = None,
        **options: Unpack[ModeKeywords],
    ) -> Inside[Attached]:
        """Every call of the model inside runs masked. The innermost context counts.

        Args:
            mode: a mode of ``tl_vpd.masking.modes``, masks by site, or a function ``(site, acts) -> mask``. Modes leave padding
                unmasked.
            sites: patterns of the sites to mask (None: all that are attached); the others run unmasked.
            pos: positions of each forward pass to mask (None: all); the others run unmasked.
            **options: of the mode: ``threshold`` of ``rounded`` (0: importances above it give mask 1); ``delta``, the factor of Δ
                (a number or ``"drawn"``); ``seed`` of random numbers (torch's global generator); ``steps`` (20) and
                ``step_size`` (``2 / steps``) of ``adversarial``, whose sources are shared over batch and positions and attack
                the KL to the target at every real token.

        Raises:
            ValueError: the mode is unknown or does not take an option, an option is impossible, the masks are of other sites or
                not finite, or ``sites`` or ``pos`` select none.
            TypeError: there is no such option, or a mode, option or mask is of another type.
            KeyError: a site pattern that matches nothing.
            RuntimeError: the decomposition has been detached.
        """
        if isinstance(mode, str):
            checked = ModeOptions.of(mode, options)
            spec = self._spec(cast(Mode, mode), None, checked, sites, pos)
        else:
            for name, value in options.items():
                if value is not None:
                    raise ValueError(
                        f"{name}={value!r} does nothing with masks or a function: {name} belongs to a mode. "
                        "A SiteMask(mask, delta) carries the factor of Δ."
                    )
            if isinstance(mode, Mapping):
                mode = Masks.of(mode, self.decomposition.counts)
            elif not callable(mode):
                raise TypeError(
                    f"The mode is a {type(mode).__name__}: give a mode's name, masks by site, or a function (site, acts) -> mask."
                )
            spec = self._spec(None, mode, ModeOptions(), sites, pos)
            if isinstance(mode, Mapping) and spec.sites.isdisjoint(mode):
                raise ValueError(
                    f"The masks name {list(mode)} and the sites masked here are {sorted(spec.sites)}: nothing would be masked."
                )
        return Inside(self, partial(self._runs_masked, spec), "masked")

    def keep_only(
        self,
        subcomponents: Subcomponents,
        *,
        rest: Literal["zero", "stochastic", "adversarial"] | str = "zero",
        sites: str | Sequence[str] | None = None,
        pos: Positions = None,
        **options: Unpack[ModeKeywords],
    ) -> Inside[Attached]:
        """Every call of the model inside runs with these subcomponents alone; the rest of every site is masked.

        Args:
            subcomponents: those with mask 1.
            rest: the masks of all others: 0, uniform in [0, 1], or by an adversary that attacks Δ too.
            sites: patterns of the sites that are masked (None: all); the others run unmasked.
            pos: as in ``masked``.
            **options: ``delta`` (0, drawn or attacked, as the rest is), ``seed``, ``steps``, ``step_size``: as in ``masked``.

        Raises:
            ValueError: ``rest`` is unknown, or does not take an option.
            TypeError: there is no such option.
            KeyError: a site does not exist.
            IndexError: a site has no such subcomponent.
        """
        modes: dict[str, Mode] = {"zero": "ci", "stochastic": "stochastic", "adversarial": "adversarial"}
        rest = choice("rest", rest, tuple(modes))
        checked = ModeOptions.of(modes[rest], options, label=f"keep_only with rest={rest!r}")
        node_set = indices_by_site(self.decomposition, subcomponents)
        spec = self._spec(modes[rest], None, checked, sites, pos, node_set)
        return Inside(self, partial(self._runs_masked, spec), "keep_only")

    def ablated(
        self,
        subcomponents: Subcomponents,
        *,
        pos: Positions = None,
        amount: float = 1.0,
        values: Mapping[str, Tensor] | None = None,
    ) -> Inside[Attached]:
        """Every call of the model inside runs without these subcomponents; see ``ablation_hooks``."""
        hooks = ablation_hooks(self.decomposition, subcomponents, pos=pos, amount=amount, values=values)
        return Inside(self, partial(self._runs_with, hooks), "ablated")

    def edited(self, edit: ChangesSites) -> Inside[Attached]:
        """Every call of the model inside runs with edited weights, and nothing is written into the model.

        Edits of contexts around this one act as well. Under masks an edited write direction acts where its subcomponent's mask
        does, and an added piece where Δ's does: the model is the one that has the edit in its weights. Functions that run the
        model themselves, such as ``causal_importances``, leave the edit out.

        Args:
            edit: of ``tl_vpd.editing``.

        Raises:
            TypeError: it is something else.
            ValueError: it is of another decomposition.
            RuntimeError: the decomposition has been detached.
        """
        if not isinstance(edit, ChangesSites):
            raise TypeError(f"The edit is a {type(edit).__name__}: give an Edit of tl_vpd.editing.")
        return Inside(self, partial(self._runs_edited, edit.site_edits(self.decomposition)), "edited")

    def __repr__(self) -> str:
        state = "detached" if not self._attachment.is_on else "runs masked" if self.runs_masked else "not masked"
        return f"Attached({len(self.sites)} sites of a {type(self.model).__name__}, {state})"

    @property
    def runs_masked(self) -> bool:
        """Whether calls of the model run masked now."""
        return bool(self._forward.specs)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, the model runs as if nothing were attached, even from a hook in the middle of a forward pass."""
        with turn(self.model), self._forward.paused():
            yield

    def _spec(
        self,
        mode: Mode | None,
        masks: Masks | MaskFunction | None,
        options: ModeOptions,
        sites: str | Sequence[str] | None,
        pos: Positions,
        node_set: Mapping[str, tuple[int, ...]] | None = None,
    ) -> MaskSpec:
        seed = options.seed
        generator = None if seed is None else torch.Generator(self.adapter.device).manual_seed(seed)
        return MaskSpec(mode, masks, frozenset(select(sites, self.sites)), options, generator, pos, node_set)

    def _runs_masked(self, spec: MaskSpec, undo: Later) -> None:
        self._require_attached("masked")
        self._forward.in_context(undo, spec)

    def _runs_edited(self, edit: Mapping[str, SiteEdit], undo: Later) -> None:
        self._require_attached("edited")
        self._forward.in_edit(undo, edit)

    def _require_attached(self, done: str) -> None:
        if not self._attachment.is_on:
            raise RuntimeError(f"This decomposition has been detached, so nothing would be {done}: attach it again.")

    def _runs_with(self, hooks: FwdHooks, undo: Later) -> None:
        enter(undo, self.model.hooks(fwd_hooks=hooks))  # type: ignore[operator]
