"""A model with a decomposition attached: HookPoints for what subcomponents do, and masked modes.

On every block of the model stand HookPoints ``blocks.{i}.hook_{site}_{what}``, with site ``q k v o in gate out``:

``component_acts``  ``x @ V``, [batch, pos, C]; patch it and the site's output follows
``ci``              causal importances of this very input, [batch, pos, C]
``mask``            the factor of each subcomponent, [batch, pos, C]
``delta_mask``      the factor of Δ, [batch, pos]

Nothing is computed for a HookPoint that nobody listens to; with no listener and no mode the model is itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformer_lens.hook_points import HookPoint

from tl_vpd.adapters import adapt
from tl_vpd.adapters.taps import Handle
from tl_vpd.decomposition import Decomposition
from tl_vpd.fingerprint import compare
from tl_vpd.hooks import registry
from tl_vpd.hooks.ablations import Positions, ablation_hooks
from tl_vpd.hooks.modes import Delta, Mode, check_mode
from tl_vpd.hooks.passes import Passes
from tl_vpd.hooks.plans import MaskFunction, Plan
from tl_vpd.masking import Masks, SiteMask
from tl_vpd.sites import Subcomponent, nearest, select

KINDS = ("component_acts", "ci", "mask", "delta_mask")


class Attached:
    """A decomposition on a model. A context manager; ``detach()`` or leaving it puts the model back as it was.

    Args:
        decomposition: V and U are used in the model's dtype and device (a copy is made if they are elsewhere; gradients
            then reach the copy).
        model: a HookedTransformer.
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
        decomposition: Decomposition,
        model: nn.Module,
        *,
        sites: str | Sequence[str] | None = None,
        hooks: str | Sequence[str] = KINDS,
        check_weights: bool = True,
    ) -> None:
        if registry.attached_to(model) is not None:
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
        self._hook_points: dict[str, dict[str, HookPoint]] = {}
        self._handles: list[Handle] = []
        parts = decomposition if self._in_place() else self._copy()
        self._passes = Passes(self.adapter, parts, self._hook_points)
        self._own_forward = self.model.__dict__.get("forward")
        try:
            self._put_on(hooks)
        except BaseException:
            self.detach()
            raise
        registry.add(self)

    # -- putting on and taking off ---------------------------------------------------------------------------------

    def _check_target(self, check_weights: bool) -> None:
        stored, here = self.decomposition.sites, self.adapter.sites
        for name, site in stored.items():
            if name not in here:
                raise ValueError(
                    f"This model has no {name}{nearest(name, here)}: the decomposition is of another model."
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
                f"{wrong[worst]:.3g} (allowed 0.02). Load the model with the settings the decomposition was made with "
                "(fold_ln, center_writing_weights and so on), or pass check_weights=False to attach all the same."
            )

    def _in_place(self) -> bool:
        parameter = next(self.decomposition.components.parameters())
        return parameter.device == self.adapter.device and parameter.dtype == self.adapter.dtype

    def _copy(self) -> Decomposition:
        original = self.decomposition
        with torch.device("meta"):
            other = Decomposition(
                list(original.sites.values()),
                original.counts,
                original.gamma_config,
                fingerprints=original.fingerprints,
            )
        # V and U in the model's dtype; Γ stays in its own, so that importances do not depend on the model's precision.
        state = {k: v.to(self.adapter.device) for k, v in original.state_dict().items()}
        state = {k: v.to(self.adapter.dtype) if k.startswith("components.") else v for k, v in state.items()}
        other.load_state_dict(state, assign=True)
        return other

    def _put_on(self, kinds: Sequence[str]) -> None:
        for name in self.sites:
            block, site = self.adapter.block(name), self.decomposition.sites[name]
            self._hook_points[name] = {}
            for kind in kinds:
                hook_point = HookPoint()
                hook_point.training = block.training
                block.add_module(site.hook_name(kind).rsplit(".", 1)[1], hook_point)
                self._hook_points[name][kind] = hook_point
        for name in self.decomposition.sites:
            passes = self._passes
            self._handles += self.adapter.tap(name, partial(passes.read, name), partial(passes.write, name))
        self._handles.append(self.adapter.tap_tokens(self._passes.see_tokens))
        self._handles.append(self.adapter.tap_attention_mask(self._passes.see_attention_mask))
        # ``run_with_hooks`` and ``generate`` call ``forward`` past the module's own hooks.
        self.model.__dict__["forward"] = self._passes.forward
        self.adapter.hook_points_changed()

    def detach(self) -> None:
        """Takes the HookPoints and taps off; hooks that users put on these HookPoints go with them."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._passes.on = False
        if self.model.__dict__.get("forward") == self._passes.forward:
            if self._own_forward is None:
                del self.model.__dict__["forward"]
            else:
                self.model.__dict__["forward"] = self._own_forward
        for name, points in self._hook_points.items():
            for kind in points:
                attribute = self.decomposition.sites[name].hook_name(kind).rsplit(".", 1)[1]
                self.adapter.block(name)._modules.pop(attribute, None)
        if self._hook_points:
            self._hook_points.clear()
            self.adapter.hook_points_changed()
        self._passes.plans.clear()
        registry.discard(self)

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
        seed: int | None = None,
        steps: int = 20,
        step_size: float | None = None,
    ) -> Iterator[Attached]:
        """Every call of the model inside runs masked. The innermost context counts.

        Args:
            mode: a mode of ``tl_vpd.hooks.modes``, masks by site, or a function ``(site, acts) -> mask``.
            threshold: for ``rounded``: importances above it stay.
            delta: factor of Δ: a number, ``"drawn"``, or None for the mode's default.
            sites: patterns of the sites to mask (None: all that are attached); the others run unmasked.
            seed: for what is drawn (None: torch's own state).
            steps, step_size: budget of the ``adversarial`` mode (None: ``2 / steps``), whose sources are shared over
                batch and positions and attack the KL to the target at every real token.

        Raises:
            ValueError: unknown mode or impossible delta. KeyError: a site pattern that matches nothing. RuntimeError:
                the decomposition has been detached.
        """
        if not self._handles:
            raise RuntimeError("This decomposition has been detached, so nothing would be masked: attach it again.")
        chosen = frozenset(select(sites, self.sites))
        generator = None if seed is None else torch.Generator(self.adapter.device).manual_seed(seed)
        name: Mode | None = None
        given: Masks | MaskFunction | None = None
        if isinstance(mode, str):
            check_mode(mode, delta)
            name = cast(Mode, mode)
        elif isinstance(mode, Mapping):
            unknown = set(mode) - set(self.decomposition.sites)
            if unknown:
                raise KeyError(f"The masks name sites that are not decomposed: {', '.join(sorted(unknown))}.")
            given = mode if isinstance(mode, Masks) else Masks(mode)
        else:
            given = mode
        plan = Plan(name, given, chosen, threshold, cast(Delta, delta), generator, steps, step_size)
        passes = self._passes
        passes.plans.append(plan)
        try:
            yield self
        finally:
            passes.plans[:] = [p for p in passes.plans if p is not plan]

    @contextmanager
    def ablated(
        self, subcomponents: Sequence[str | Subcomponent], *, pos: Positions = None, amount: float = 1.0
    ) -> Iterator[Attached]:
        """Every call of the model inside runs without these subcomponents; see ``ablation_hooks``."""
        hooks = ablation_hooks(self.decomposition, subcomponents, pos=pos, amount=amount)
        with self.model.hooks(fwd_hooks=hooks):  # type: ignore[operator]
            yield self

    def paused(self) -> AbstractContextManager[None]:
        """Inside, the model runs as if nothing were attached, even from a hook in the middle of a forward pass."""
        return self._passes.paused()
