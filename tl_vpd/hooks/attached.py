"""A model with a decomposition attached: HookPoints for what subcomponents do, and masked modes.

On every block of the model stand HookPoints ``blocks.{i}.hook_{site}_{what}``, with site ``q k v o in gate out``:

``component_acts``  ``x @ V``, [batch, pos, C]; patch it and the site's output follows
``ci``              causal importances of this very input, [batch, pos, C]
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

from tl_vpd.adapters import adapt
from tl_vpd.adapters.taps import Handle
from tl_vpd.adapters.versions import HookPoint
from tl_vpd.components.fingerprint import compare
from tl_vpd.forward import CastWeights, attachments
from tl_vpd.hooks.ablations import ablation_hooks, indices_by_site
from tl_vpd.hooks.attached_forward import AttachedForward
from tl_vpd.hooks.checked_names import CheckedNames
from tl_vpd.hooks.mask_spec import MaskFunction, MaskSpec
from tl_vpd.hooks.sparse import Positions, SparsePoint
from tl_vpd.importance import DecomposedWeights
from tl_vpd.masking import Masks, SiteMask
from tl_vpd.masking.modes import Delta, Mode, check_mode
from tl_vpd.site import Subcomponent, nearest, select

KINDS = ("component_acts", "ci", "mask", "delta_mask")


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
    """A decomposition on a model. A context manager; ``detach()`` or leaving it puts the model back as it was.

    Args:
        decomposition: V and U are used in the model's dtype and on its device; gradients reach them wherever they are.
        model: a HookedTransformer, a TransformerBridge, or a HookedRootModule with ``nn.Linear`` layers.
        sites: patterns of the sites to expose and mask (None: all).
        hooks: which of ``component_acts``, ``ci``, ``mask``, ``delta_mask`` get HookPoints.
        check_weights: refuse a model with other weights than the decomposition was made from.

    Raises:
        ValueError: the weights differ (the message gives the size of the mismatch), a flag is not supported, or another
            decomposition is attached already.
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
        hooks = [hooks] if isinstance(hooks, str) else list(hooks)
        for kind in hooks:
            if kind not in KINDS:
                raise KeyError(f"{kind!r} is no kind of hook{nearest(kind, KINDS)}. Kinds: {', '.join(KINDS)}.")
        self.decomposition = decomposition
        self.model = model
        self.adapter = adapt(model)
        self._check_target(check_weights)
        self.sites = select(sites, decomposition.sites)
        self.hook_points: dict[str, dict[str, HookPoint]] = {}
        self._handles: list[Handle] = []
        weights = CastWeights(decomposition, self.adapter.device, self.adapter.dtype)
        self._forward = AttachedForward(self.adapter, weights, self.hook_points)
        self._forward.check_weights = check_weights
        self._own_forward = self.model.__dict__.get("forward")
        try:
            self._put_on(hooks)
        except BaseException:
            self.detach()
            raise
        self._forward.owner = self
        attachments.add(self)

    # -- putting on and taking off ---------------------------------------------------------------------------------

    def _check_target(self, check_weights: bool) -> None:
        stored, here = self.decomposition.sites, self.adapter.sites
        for name, site in stored.items():
            if name not in here:
                owner = name.rpartition(".")[0]
                reason = self.adapter.refused.get(name) or self.adapter.refused.get(owner)
                raise ValueError(
                    f"This model has no {name} that can be decomposed: {reason}."
                    if reason
                    else f"This model has no {name}{nearest(name, here)}: the decomposition is of another model."
                )
            if (site.d_in, site.d_out) != (here[name].d_in, here[name].d_out):
                raise ValueError(
                    f"{name} is {here[name].d_in}x{here[name].d_out} in this model and {site.d_in}x{site.d_out} in the "
                    "decomposition: it is of another model."
                )
        if not check_weights:
            return
        wrong = compare(self.decomposition.fingerprints, {name: self.adapter.weight(name) for name in stored})
        if wrong:
            worst = max(wrong, key=lambda name: wrong[name])
            raise ValueError(
                f"This model's weights are not the decomposed ones: {len(wrong)} of {len(stored)} sites differ, {worst} by "
                f"{wrong[worst]:.3g} (allowed 0.02). {self._processed()}Load the model with the settings the decomposition was "
                "made with (fold_ln, center_writing_weights, enable_compatibility_mode and so on), or pass check_weights=False "
                "to attach all the same."
            )

    def _processed(self) -> str:
        """What of the weights' processing is known to differ, as a sentence."""
        then: dict[str, bool] = self.decomposition.record.get("target", {}).get("processing", {})
        now = self.adapter.processing()
        differ = [flag for flag in then if flag in now and then[flag] != now[flag]]
        if not differ:
            return ""
        was, is_now = (", ".join(f"{flag}={flags[flag]}" for flag in differ) for flags in (then, now))
        return f"They look processed differently: the decomposition was made with {was}, this model has {is_now}. "

    def _put_on(self, kinds: Sequence[str]) -> None:
        for name in self.sites:
            home, site = self.adapter.home(name), self.decomposition.sites[name]
            self.hook_points[name] = {}
            for kind in kinds:
                attribute = site.hook_name(kind).rpartition(".")[2]
                if hasattr(home, attribute):
                    raise ValueError(f"The model has a {site.hook_name(kind)} already, which attaching would hide.")
                hook_point = SparsePoint() if kind in ("component_acts", "mask") else HookPoint()
                hook_point.training = home.training
                home.add_module(attribute, hook_point)
                self.hook_points[name][kind] = hook_point
        self._handles += self._forward.taps.put_on()
        self._handles += self.adapter.tap_inputs(self._forward.see_tokens, self._forward.see_attention_mask)
        # ``run_with_hooks`` and ``generate`` call ``forward`` past the module's own hooks.
        self.model.__dict__["forward"] = self._forward.forward
        own_names = [self.decomposition.sites[n].hook_name(k) for n, points in self.hook_points.items() for k in points]
        self._handles.append(CheckedNames(self.model, own_names, self._forward))
        self.adapter.hook_points_changed()

    def detach(self) -> None:
        """Takes the HookPoints and taps off; hooks that users put on these HookPoints go with them."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forward.on = False
        if self.model.__dict__.get("forward") == self._forward.forward:
            if self._own_forward is None:
                del self.model.__dict__["forward"]
            else:
                self.model.__dict__["forward"] = self._own_forward
        for name, points in self.hook_points.items():
            for kind in points:
                attribute = self.decomposition.sites[name].hook_name(kind).rpartition(".")[2]
                self.adapter.home(name)._modules.pop(attribute, None)
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
        mode: Mode | str | Mapping[str, SiteMask] | MaskFunction,
        *,
        threshold: float = 0.0,
        delta: Delta | str = None,
        sites: str | Sequence[str] | None = None,
        pos: Positions = None,
        seed: int | None = None,
        steps: int = 20,
        step_size: float | None = None,
    ) -> Iterator[Attached]:
        """Every call of the model inside runs masked. The innermost context counts.

        Args:
            mode: a mode of ``tl_vpd.masking.modes``, masks by site, or a function ``(site, acts) -> mask``.
            threshold: for ``rounded``: importances above it stay.
            delta: factor of Δ: a number, ``"drawn"``, or None for the mode's default.
            sites: patterns of the sites to mask (None: all that are attached); the others run unmasked.
            pos: positions of each forward pass to mask (None: all); the others run unmasked.
            seed: for what is drawn (None: torch's own state).
            steps, step_size: budget of the ``adversarial`` mode (None: ``2 / steps``), whose sources are shared over
                batch and positions and attack the KL to the target at every real token.

        Raises:
            ValueError: unknown mode or impossible delta. KeyError: a site pattern that matches nothing. RuntimeError:
                the decomposition has been detached.
        """
        name: Mode | None = None
        given: Masks | MaskFunction | None = None
        if isinstance(mode, str):
            check_mode(mode, delta)
            name = cast(Mode, mode)
        elif isinstance(mode, Mapping):
            for site in mode:
                if site not in self.decomposition.sites:
                    raise KeyError(f"The masks name {site!r}, which is not decomposed{nearest(site, self.sites)}.")
            given = mode if isinstance(mode, Masks) else Masks(mode)
        else:
            given = mode
        with self._planned(
            MaskSpec(
                name,
                given,
                self._chosen(sites),
                threshold=threshold,
                delta=cast(Delta, delta),
                generator=self._generator(seed),
                steps=steps,
                step_size=step_size,
                pos=pos,
            )
        ):
            yield self

    @contextmanager
    def keep_only(
        self,
        subcomponents: str | Subcomponent | Sequence[str | Subcomponent],
        *,
        rest: Literal["zero", "stochastic", "adversarial"] | str = "zero",
        delta: Delta | str = None,
        sites: str | Sequence[str] | None = None,
        pos: Positions = None,
        seed: int | None = None,
        steps: int = 20,
        step_size: float | None = None,
    ) -> Iterator[Attached]:
        """Every call of the model inside keeps these subcomponents alone; the rest of every site is masked.

        Args:
            subcomponents: what stays, with mask 1.
            rest: the masks of all others: 0, drawn from [0, 1], or found by an adversary that attacks Δ too.
            delta: factor of Δ (None: 0, drawn or attacked, as the rest is).
            sites: patterns of the sites that are cut down (None: all); the others run unmasked.
            pos, seed, steps, step_size: as in ``masked``.

        Raises:
            ValueError, KeyError, IndexError: an unknown ``rest``, site or subcomponent.
        """
        modes: dict[str, Mode] = {"zero": "ci", "stochastic": "stochastic", "adversarial": "adversarial"}
        if rest not in modes:
            raise ValueError(f"rest={rest!r}{nearest(rest, modes)}: choose zero, stochastic or adversarial.")
        check_mode(modes[rest], delta)
        with self._planned(
            MaskSpec(
                modes[rest],
                None,
                self._chosen(sites),
                delta=cast(Delta, delta),
                generator=self._generator(seed),
                steps=steps,
                step_size=step_size,
                pos=pos,
                node_set=indices_by_site(self.decomposition, subcomponents),
            )
        ):
            yield self

    @contextmanager
    def ablated(
        self,
        subcomponents: str | Subcomponent | Sequence[str | Subcomponent],
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

    def _chosen(self, sites: str | Sequence[str] | None) -> frozenset[str]:
        return frozenset(select(sites, self.sites))

    def _generator(self, seed: int | None) -> torch.Generator | None:
        return None if seed is None else torch.Generator(self.adapter.device).manual_seed(seed)

    @contextmanager
    def _planned(self, spec: MaskSpec) -> Iterator[None]:
        if not self._handles:
            raise RuntimeError("This decomposition has been detached, so nothing would be masked: attach it again.")
        specs = self._forward.specs
        specs.append(spec)
        try:
            yield
        finally:
            specs[:] = [s for s in specs if s is not spec]
