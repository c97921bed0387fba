"""A model with a decomposition attached: HookPoints for what subcomponents do, and masked modes.

On every block of the model stand HookPoints ``blocks.{i}.hook_{site}_{what}``, with site ``q k v o in gate out``:

``component_acts``  ``x @ V``, [batch, pos, C]; patch it and the site's output follows
``ci``              causal importances of this very input, [batch, pos, C]
``mask``            the factor of each subcomponent, [batch, pos, C]
``delta_mask``      the factor of Δ, [batch, pos]

Nothing is computed for a HookPoint that nobody listens to; with no listener and no mode the model is itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformer_lens.hook_points import HookPoint

from tl_vpd.adapters import adapt
from tl_vpd.components import masked_output
from tl_vpd.decomposition import Decomposition
from tl_vpd.divergence import kl_divergence
from tl_vpd.fingerprint import compare
from tl_vpd.hooks import registry
from tl_vpd.hooks.ablations import Positions, ablation_hooks
from tl_vpd.hooks.importances import zero_padding
from tl_vpd.hooks.modes import NEED_IMPORTANCES, Delta, Mode, check_mode, masks_of_mode
from tl_vpd.hooks.tapped import users_hooks_aside
from tl_vpd.importance import lower_leaky
from tl_vpd.masking import Masks, SiteMask, fresh_pgd, masks_from_sources
from tl_vpd.sites import Packing, Subcomponent, nearest, select

KINDS = ("component_acts", "ci", "mask", "delta_mask")
MaskFunction = Callable[[str, Tensor], Tensor | SiteMask]
"""Takes a site's name and its inner activations ``[batch, pos, C]``; gives their mask."""


@dataclass(frozen=True, eq=False)
class _Plan:
    """What a masked context asks of every forward pass."""

    mode: Mode | None
    masks: Masks | MaskFunction | None
    sites: frozenset[str]
    threshold: float
    delta: Delta
    generator: torch.Generator | None
    steps: int
    step_size: float | None

    @property
    def needs_importances(self) -> bool:
        return self.mode in NEED_IMPORTANCES


class Attached:
    """A decomposition on a model. A context manager; ``detach()`` or leaving it puts the model back as it was.

    Args:
        decomposition: used in the model's dtype and device (a copy is made if it is elsewhere).
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
        self._parts = decomposition if self._in_place() else self._copy()
        self._plans: list[_Plan] = []
        self._hook_points: dict[str, dict[str, HookPoint]] = {}
        self._handles: list[RemovableHandle] = []
        self._inside = False
        self._reset()
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
        parameter = next(self.decomposition.parameters())
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
        state = {k: v.to(self.adapter.device, self.adapter.dtype) for k, v in original.state_dict().items()}
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
            self._handles += self.adapter.tap(name, partial(self._read, name), partial(self._write, name))
        self._handles.append(self.adapter.tap_tokens(self._see_tokens))
        self._handles.append(self.adapter.tap_attention_mask(self._see_attention_mask))
        self._own_forward = self.model.__dict__.get("forward")
        self._plain_forward = self.model.forward
        self.model.__dict__["forward"] = self._forward
        self.adapter.hook_points_changed()

    def detach(self) -> None:
        """Takes the HookPoints and taps off; hooks that users put on these HookPoints go with them."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self.model.__dict__.get("forward") == self._forward:
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
        self._plans.clear()
        self._reset()
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
        plan = _Plan(name, given, chosen, threshold, cast(Delta, delta), generator, steps, step_size)
        self._plans.append(plan)
        try:
            yield self
        finally:
            self._plans = [p for p in self._plans if p is not plan]

    @contextmanager
    def ablated(
        self, subcomponents: Sequence[str | Subcomponent], *, pos: Positions = None, amount: float = 1.0
    ) -> Iterator[Attached]:
        """Every call of the model inside runs without these subcomponents; see ``ablation_hooks``."""
        hooks = ablation_hooks(self.decomposition, subcomponents, pos=pos, amount=amount)
        with self.model.hooks(fwd_hooks=hooks):  # type: ignore[operator]
            yield self

    # -- one forward pass ------------------------------------------------------------------------------------------

    def _reset(self) -> None:
        self._x: dict[str, Tensor] = {}
        self._inputs: dict[str, Tensor] | None = None
        self._masks: Masks | None = None
        self._fired: dict[str, int] = {}
        self._tokens: Tensor | None = None
        self._attention_mask: Tensor | None = None

    def _listening(self, name: str, kind: str) -> HookPoint | None:
        hook_point = self._hook_points.get(name, {}).get(kind)
        if hook_point is None or not (hook_point._forward_hooks or hook_point._backward_hooks):
            return None
        return hook_point

    def _forward(self, *arguments: Any, **keywords: Any) -> Any:
        """Stands in for the model's ``forward``: ``run_with_hooks`` and ``generate`` call that without the model's hooks."""
        if self._inside or not self._handles:
            return self._plain_forward(*arguments, **keywords)
        self._reset()
        try:
            self._before(arguments, keywords)
            output = self._plain_forward(*arguments, **keywords)
            self._after(arguments, keywords)
            return output
        finally:
            self._reset()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, the model runs as if nothing were attached, even from a hook in the middle of a forward pass."""
        before = dict(vars(self))
        self._reset()
        self._inside = True
        try:
            yield
        finally:
            vars(self).update(before)

    def _before(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self.adapter.check()
        plan = self._plans[-1] if self._plans else None
        wants_ci = any(self._listening(name, "ci") for name in self.sites)
        masked = plan is not None and plan.needs_importances
        if not (wants_ci or masked):
            return
        what = f"The mode {plan.mode!r}" if plan is not None and masked else "hook_ci"
        if (argument := self.adapter.truncation(arguments, keywords)) is not None:
            raise ValueError(f"{what} needs every site's input, and {argument} skips blocks: leave {argument} out.")
        if self.adapter.kv_cache(arguments, keywords) is not None:
            raise ValueError(
                f"{what} needs the whole prefix at every step, which a KV cache leaves out: generate with "
                "use_past_kv_cache=False."
            )
        if plan is not None and masked:
            self._masks = self._find_masks(plan, arguments, keywords)
        else:
            self._inputs = {}

    def _find_masks(self, plan: _Plan, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Masks:
        """The clean pass that a mode needs, and the masks made from its importances."""
        assert plan.mode is not None
        attacked = plan.mode == "adversarial"
        self._inputs = {}
        with self._own_pass(), torch.no_grad():
            logits = self.adapter.call(arguments, keywords, "logits" if attacked else None)
        g = self._fire_importances()
        if not attacked:
            return masks_of_mode(
                plan.mode, g, self._parts.packing, threshold=plan.threshold, delta=plan.delta, generator=plan.generator
            ).only(self._masked_sites(plan))
        # Under inference_mode the attack needs copies that autograd may save.
        with torch.inference_mode(False):
            arguments, keywords = tuple(map(_savable, arguments)), {k: _savable(v) for k, v in keywords.items()}
            constant, keep = _savable(g.detach()), _savable(self._keep())
            target = _savable(logits).float().log_softmax(-1)

        def loss(sources: Tensor) -> Tensor:
            self._masks = masks_from_sources(constant, sources, self._parts.packing).only(self._masked_sites(plan))
            return kl_divergence(target, self.adapter.call(arguments, keywords, "logits"), keep)

        width = self._parts.packing.total + len(self._parts.packing.names)
        device = self.adapter.device
        start = torch.rand(1, 1, width, generator=plan.generator, device=device).to(g.dtype)
        with self._own_pass(), torch.inference_mode(False):
            found = fresh_pgd(loss, start, steps=plan.steps, step_size=plan.step_size)
        return masks_from_sources(g, found.sources, self._parts.packing).only(self._masked_sites(plan))

    def _masked_sites(self, plan: _Plan) -> list[str]:
        return [name for name in self.decomposition.sites if name in plan.sites]

    @contextmanager
    def _own_pass(self) -> Iterator[None]:
        """Runs of the model on the plugin's own behalf: users' passing hooks are not called, nor are ours."""
        self._inside = True
        try:
            with users_hooks_aside(self.model):
                yield
        finally:
            self._inside = False
            self._x.clear()
            self._fired.clear()

    def _keep(self) -> Tensor | None:
        return self.adapter.padding(self._tokens, self._attention_mask)

    def _fire_importances(self) -> Float[Tensor, "batch pos C_total"]:
        """Γ on the inputs just collected, sent through the users' hooks on ``hook_ci``."""
        assert self._inputs is not None
        keep = self._keep()
        g = zero_padding(lower_leaky(self._parts.pre_sigmoid(self._inputs, keep)), keep)
        self._inputs = None
        listeners = {name: self._listening(name, "ci") for name in self._parts.sites}
        if not any(listeners.values()):
            return g
        by_site = self._parts.packing.unpack(g)
        return torch.cat(
            [point(by_site[n].clone()) if (point := listeners[n]) else by_site[n] for n in by_site], dim=-1
        )

    def _after(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if self.adapter.truncation(arguments, keywords) is None:
            wrong = {n: self._fired.get(n, 0) for n in self.decomposition.sites if self._fired.get(n, 0) != 1}
            if wrong:
                raise RuntimeError(
                    f"In this forward pass these sites ran another number of times than once: {wrong}. Masks and hooks "
                    "would not act; the model computes them in a way that is not supported."
                )
        if self._inputs is not None:
            self._fire_importances()

    def _see_tokens(self, tokens: Tensor) -> None:
        self._tokens = tokens

    def _see_attention_mask(self, attention_mask: Tensor | None) -> None:
        self._attention_mask = attention_mask

    def _read(self, name: str, x: Tensor) -> None:
        if self._inputs is not None:
            self._inputs[name] = x
        self._x[name] = x

    def _write(self, name: str, y: Tensor) -> Tensor | None:
        self._fired[name] = self._fired.get(name, 0) + 1
        x = self._x.pop(name)
        if self._inside:
            own = None if self._masks is None else self._masks.get(name)
            return None if own is None else self._masked(name, x @ self._parts.V[name], y, own)
        plan = self._plans[-1] if self._plans and name in self._plans[-1].sites else None
        acts_point, mask_point, delta_point = (
            self._listening(name, k) for k in ("component_acts", "mask", "delta_mask")
        )
        if plan is None and not (acts_point or mask_point or delta_point):
            return None
        acts = x @ self._parts.V[name]
        patched, acts = _through(acts_point, acts, lambda: x @ self._parts.V[name])
        own = SiteMask(None, None) if plan is None else self._planned(plan, name, acts)
        mask, delta = own.mask, own.delta
        if mask_point is not None:
            mask = mask_point(torch.ones_like(acts) if mask is None else mask.expand_as(acts).clone())
        if delta_point is not None:
            ones = torch.ones_like(acts[..., 0])
            delta = delta_point(ones if delta is None else delta.expand_as(ones).clone())
        if patched is None and mask is None and delta is None:
            return None
        return self._masked(name, acts, y, SiteMask(mask, delta, own.routed), patched)

    def _planned(self, plan: _Plan, name: str, acts: Tensor) -> SiteMask:
        """What the innermost masked context wants of this site in this pass."""
        if plan.needs_importances:
            if self._masks is None:
                raise RuntimeError("Masks need the clean pass that comes first: call model(...) or model.forward(...).")
            return self._masks[name]
        if plan.mode is not None:
            one = Packing({name: acts.shape[-1]})
            return masks_of_mode(plan.mode, acts.detach(), one, delta=plan.delta, generator=plan.generator)[name]
        if isinstance(plan.masks, Masks):
            own = plan.masks.get(name, SiteMask(None, None))
            _check_mask(name, own, acts)
            return own
        assert plan.masks is not None
        given = plan.masks(name, acts)
        own = given if isinstance(given, SiteMask) else SiteMask(given, None)
        _check_mask(name, own, acts)
        return own

    def _masked(self, name: str, acts: Tensor, y: Tensor, own: SiteMask, patched: Tensor | None = None) -> Tensor:
        return masked_output(
            y,
            acts,
            self._parts.U[name],
            self.adapter.bias(name),
            mask=None if own.mask is None else own.mask.to(acts),
            delta_mask=None if own.delta is None else own.delta.to(acts),
            routed=own.routed,
            patched_acts=patched,
        )


def _through(
    point: HookPoint | None, acts: Float[Tensor, "batch pos C"], again: Callable[[], Tensor]
) -> tuple[Tensor | None, Tensor]:
    """Sends activations through a HookPoint; gives (what came out if it may differ, the activations as they were).

    With gradients on, what came out is its own node of the graph, so that a cached activation has a gradient.
    """
    if point is None:
        return None, acts
    if acts.is_inference():
        sent = acts.clone()
        out = point(sent)
        return (None if out is sent and torch.equal(sent, acts) else out), acts
    sent = acts.view_as(acts) if torch.is_grad_enabled() else acts
    version = acts._version
    out = point(sent)
    if acts._version != version:  # a hook wrote into them
        return out, again()
    return (out if out is not sent or out.requires_grad else None), acts


def _savable(value: Any) -> Any:
    """A copy of an inference tensor that autograd may save; anything else as it is."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def _check_mask(name: str, own: SiteMask, acts: Tensor) -> None:
    for what, given, wanted in (("mask", own.mask, acts.shape), ("Δ's mask", own.delta, acts.shape[:-1])):
        if given is None:
            continue
        try:
            fits = torch.broadcast_shapes(given.shape, wanted) == wanted
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"The {what} for {name} is {tuple(given.shape)}, this forward pass needs {tuple(wanted)}: masks belong to the "
                "prompt they were made for. Give a function (site, acts) -> mask where the length changes."
            )
