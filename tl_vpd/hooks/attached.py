"""A model with a decomposition attached: HookPoints for what subcomponents do, and masked modes.

Every block of the model has HookPoints ``blocks.{i}.hook_{site}_{what}``, with site ``q k v o in gate out``:

``component_acts``  ``x @ V``, [batch, pos, C]; patch it and the site's output follows
``ci``              causal importances on this input, [batch, pos, C]
``mask``            the factor of each subcomponent, [batch, pos, C]
``delta_mask``      the factor of Δ, [batch, pos, 1]

Nothing is computed for a HookPoint that nobody listens to; with no listener and no mode the model is itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from tl_vpd.adapters import adapt
from tl_vpd.adapters.taps import Handle
from tl_vpd.adapters.versions import HookPoint
from tl_vpd.forward import CastWeights, attachments
from tl_vpd.forward.target_check import accept_target, check_target
from tl_vpd.hooks import hook_points
from tl_vpd.hooks.ablations import Subcomponents, ablation_hooks, indices_by_site
from tl_vpd.hooks.attached_forward import AttachedForward
from tl_vpd.hooks.checked_names import CheckedNames
from tl_vpd.hooks.hook_points import KINDS
from tl_vpd.hooks.mask_spec import MaskFunction, MaskSpec
from tl_vpd.hooks.sparse import Positions
from tl_vpd.importance import DecomposedWeights
from tl_vpd.masking import Masks, SiteMask
from tl_vpd.masking.modes import Mode, ModeKeywords, ModeOptions
from tl_vpd.site import nearest, select


def attached_to(model: nn.Module) -> Attached | None:
    """What is attached to this model, if anything."""
    return cast("Attached | None", attachments.attached_to(model))


def attachment_of(decomposition: DecomposedWeights, model: nn.Module) -> Attached | None:
    """This decomposition's attachment to this model, if it is attached; raises ValueError if another one is."""
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
        if attachments.attached_to(model) is not None:
            raise ValueError("A decomposition is attached to this model already: detach it first.")
        kinds = hook_points.check_kinds(hooks)
        self.decomposition = decomposition
        self.model = model
        self.adapter = adapt(model)
        check_target(decomposition, self.adapter, check_weights=check_weights)
        if not check_weights:
            accept_target(decomposition, model)
        self.sites = select(sites, decomposition.sites)
        self.hook_points: dict[str, dict[str, HookPoint]] = {}
        self._handles: list[Handle] = []
        weights = CastWeights(decomposition, self.adapter.device, self.adapter.dtype)
        self._forward = AttachedForward(self.adapter, weights, self.hook_points)
        self._forward_before = self.model.__dict__.get("forward")
        try:
            self._put_on(kinds)
        except BaseException:
            self.detach()
            raise
        self._forward.owner = self
        attachments.add(self)

    # -- putting on and removing -----------------------------------------------------------------------------------

    def _put_on(self, kinds: Sequence[str]) -> None:
        for name in self.sites:
            self.hook_points[name] = {}
            hook_points.put_on(self.adapter, self.decomposition.sites[name], kinds, self.hook_points[name])
        self._handles += self._forward.taps.put_on()
        self._handles += self.adapter.tap_inputs(self._forward.see_tokens, self._forward.see_attention_mask)
        # ``run_with_hooks`` and ``generate`` call ``forward`` past the module's hooks.
        self.model.__dict__["forward"] = self._forward.forward
        names = [self.decomposition.sites[n].hook_name(k) for n, points in self.hook_points.items() for k in points]
        self._handles.append(CheckedNames(self.model, names, self._forward))
        self.adapter.hook_points_changed()

    def detach(self) -> None:
        """Removes the HookPoints and taps; hooks that users put on these HookPoints go with them."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forward.on = False
        if self.model.__dict__.get("forward") == self._forward.forward:
            if self._forward_before is None:
                del self.model.__dict__["forward"]
            else:
                self.model.__dict__["forward"] = self._forward_before
        for name, points in self.hook_points.items():
            hook_points.remove(self.adapter, self.decomposition.sites[name], points)
        if self.hook_points:
            self.hook_points.clear()
            self.adapter.hook_points_changed()
        self._forward.specs.clear()
        attachments.discard(self)

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.detach()

    # -- modes -----------------------------------------------------------------------------------------------------

    @contextmanager
    def masked(
        self,
        mode: Mode | str | Mapping[str, SiteMask | Tensor] | MaskFunction,
        *,
        sites: str | Sequence[str] | None = None,
        pos: Positions = None,
        **options: Unpack[ModeKeywords],
    ) -> Iterator[Attached]:
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
            ValueError: the mode is unknown or does not take an option, an option is impossible, or the masks are of other sites.
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
                for site in mode:
                    if site not in self.decomposition.sites:
                        raise KeyError(f"The masks name {site!r}, which is not decomposed{nearest(site, self.sites)}.")
                mode = mode if isinstance(mode, Masks) else Masks(mode)
            elif not callable(mode):
                raise TypeError(
                    f"{mode!r} is a {type(mode).__name__}: give a mode's name, masks by site, or a function (site, acts) -> mask."
                )
            spec = self._spec(None, mode, ModeOptions(), sites, pos)
            if isinstance(mode, Mapping) and spec.sites.isdisjoint(mode):
                raise ValueError(
                    f"The masks name {list(mode)} and the sites masked here are {sorted(spec.sites)}: nothing would be masked."
                )
        with self._running(spec):
            yield self

    @contextmanager
    def keep_only(
        self,
        subcomponents: Subcomponents,
        *,
        rest: Literal["zero", "stochastic", "adversarial"] | str = "zero",
        sites: str | Sequence[str] | None = None,
        pos: Positions = None,
        **options: Unpack[ModeKeywords],
    ) -> Iterator[Attached]:
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
        if rest not in modes:
            raise ValueError(f"rest={rest!r}{nearest(rest, modes)}: choose zero, stochastic or adversarial.")
        checked = ModeOptions.of(modes[rest], options, label=f"keep_only with rest={rest!r}")
        node_set = indices_by_site(self.decomposition, subcomponents)
        with self._running(self._spec(modes[rest], None, checked, sites, pos, node_set)):
            yield self

    @contextmanager
    def ablated(
        self,
        subcomponents: Subcomponents,
        *,
        pos: Positions = None,
        amount: float = 1.0,
        values: Mapping[str, Tensor] | None = None,
    ) -> Iterator[Attached]:
        """Every call of the model inside runs without these subcomponents; see ``ablation_hooks``."""
        hooks = ablation_hooks(self.decomposition, subcomponents, pos=pos, amount=amount, values=values)
        with self.model.hooks(fwd_hooks=hooks):  # type: ignore[operator]
            yield self

    @property
    def runs_masked(self) -> bool:
        """Whether calls of the model run masked now."""
        return bool(self._forward.specs)

    def paused(self) -> AbstractContextManager[None]:
        """Inside, the model runs as if nothing were attached, even from a hook in the middle of a forward pass."""
        return self._forward.paused()

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

    @contextmanager
    def _running(self, spec: MaskSpec) -> Iterator[None]:
        if not self._handles:
            raise RuntimeError("This decomposition has been detached, so nothing would be masked: attach it again.")
        specs = self._forward.specs
        specs.append(spec)
        try:
            yield
        finally:
            specs[:] = [s for s in specs if s is not spec]
