"""One forward pass of an attached model: what is captured, computed and changed at each site.

In order: a clean pass first if a mode needs importances; then at every site its input is noted (``read``), and its output is
changed (``write``) if a mode is on or somebody listens to its HookPoints; at the end every site must have run exactly once,
and importances that somebody listens to are computed from the inputs just seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from tl_vpd.adapters import HookedTransformerAdapter
from tl_vpd.components import masked_output
from tl_vpd.decomposition import Decomposition
from tl_vpd.divergence import kl_divergence
from tl_vpd.hooks.importances import zero_padding
from tl_vpd.hooks.modes import masks_of_mode
from tl_vpd.hooks.plans import Plan, check_mask
from tl_vpd.hooks.tapped import users_hooks_aside
from tl_vpd.importance import lower_leaky
from tl_vpd.masking import Masks, SiteMask, fresh_pgd, masks_from_sources
from tl_vpd.sites import Packing


class Passes:
    """The forward passes of an attached model. ``plans`` is a stack: the last one counts.

    Args:
        adapter: of the model. parts: V, U and Γ in the model's dtype and device.
        hook_points: by site and kind; what is not there is never listened to.
    """

    def __init__(
        self,
        adapter: HookedTransformerAdapter,
        parts: Decomposition,
        hook_points: Mapping[str, Mapping[str, HookPoint]],
    ) -> None:
        self.adapter, self.parts, self.hook_points = adapter, parts, hook_points
        self.plain_forward = adapter.model.forward
        self.plans: list[Plan] = []
        self.on = True
        self._inside = False
        self._reset()

    def _reset(self) -> None:
        self._x: dict[str, Tensor] = {}
        self._inputs: dict[str, Tensor] | None = None
        self._masks: Masks | None = None
        self._fired: dict[str, int] = {}
        self._tokens: Tensor | None = None
        self._attention_mask: Tensor | None = None

    def _listening(self, name: str, kind: str) -> HookPoint | None:
        hook_point = self.hook_points.get(name, {}).get(kind)
        if hook_point is None or not (hook_point._forward_hooks or hook_point._backward_hooks):
            return None
        return hook_point

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """Stands in for the model's ``forward``: ``run_with_hooks`` and ``generate`` call that without the model's hooks."""
        if self._inside or not self.on:
            return self.plain_forward(*arguments, **keywords)
        self._reset()
        try:
            self._before(arguments, keywords)
            output = self.plain_forward(*arguments, **keywords)
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
        plan = self.plans[-1] if self.plans else None
        wants_ci = any(self._listening(name, "ci") for name in self.hook_points)
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
        if plan is None:
            self._inputs = {}  # this very pass is the clean one
        elif masked:
            self._masks = self._find_masks(plan, arguments, keywords)
        else:
            self._clean(arguments, keywords)

    def _clean(
        self, arguments: tuple[Any, ...], keywords: dict[str, Any], return_type: str | None = None
    ) -> tuple[Any, Float[Tensor, "batch pos C_total"]]:
        """A clean pass on the same arguments: its output and, through the users' hooks, its importances."""
        self._inputs = {}
        with self._own_pass(), torch.no_grad():
            output = self.adapter.call(arguments, keywords, return_type)
        return output, self._fire_importances()

    def _find_masks(self, plan: Plan, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Masks:
        """The clean pass that a mode needs, and the masks made from its importances."""
        assert plan.mode is not None
        attacked = plan.mode == "adversarial"
        logits, g = self._clean(arguments, keywords, "logits" if attacked else None)
        if not attacked:
            return masks_of_mode(
                plan.mode, g, self.parts.packing, threshold=plan.threshold, delta=plan.delta, generator=plan.generator
            ).only(self._masked_sites(plan))
        # Under inference_mode the attack needs copies that autograd may save.
        with torch.inference_mode(False):
            arguments, keywords = tuple(map(_savable, arguments)), {k: _savable(v) for k, v in keywords.items()}
            constant, keep = _savable(g.detach()), _savable(self._keep())
            target = _savable(logits).float().log_softmax(-1)

        def loss(sources: Tensor) -> Tensor:
            self._masks = masks_from_sources(constant, sources, self.parts.packing).only(self._masked_sites(plan))
            return kl_divergence(target, self.adapter.call(arguments, keywords, "logits"), keep)

        width = self.parts.packing.total + len(self.parts.packing.names)
        device = self.adapter.device
        start = torch.rand(1, 1, width, generator=plan.generator, device=device).to(g.dtype)
        with self._own_pass(), torch.inference_mode(False):
            found = fresh_pgd(loss, start, steps=plan.steps, step_size=plan.step_size)
        return masks_from_sources(g, found.sources, self.parts.packing).only(self._masked_sites(plan))

    def _masked_sites(self, plan: Plan) -> list[str]:
        return [name for name in self.parts.sites if name in plan.sites]

    @contextmanager
    def _own_pass(self) -> Iterator[None]:
        """Runs of the model on the plugin's own behalf: users' passing hooks are not called, nor are ours."""
        self._inside = True
        try:
            with users_hooks_aside(self.adapter.model):
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
        g = zero_padding(lower_leaky(self.parts.pre_sigmoid(self._inputs, keep)), keep)
        self._inputs = None
        listeners = {name: self._listening(name, "ci") for name in self.parts.sites}
        if not any(listeners.values()):
            return g
        by_site = self.parts.packing.unpack(g)
        return torch.cat(
            [point(by_site[n].clone()) if (point := listeners[n]) else by_site[n] for n in by_site], dim=-1
        )

    def _after(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if self.adapter.truncation(arguments, keywords) is None:
            wrong = {n: self._fired.get(n, 0) for n in self.parts.sites if self._fired.get(n, 0) != 1}
            if wrong:
                raise RuntimeError(
                    f"In this forward pass these sites ran another number of times than once: {wrong}. Masks and hooks "
                    "would not act; the model computes them in a way that is not supported."
                )
        if self._inputs is not None:
            self._fire_importances()

    def see_tokens(self, tokens: Tensor) -> None:
        self._tokens = tokens

    def see_attention_mask(self, attention_mask: Tensor | None) -> None:
        self._attention_mask = attention_mask

    def read(self, name: str, x: Tensor) -> None:
        if self._inputs is not None:
            self._inputs[name] = x
        self._x[name] = x

    def write(self, name: str, y: Tensor) -> Tensor | None:
        self._fired[name] = self._fired.get(name, 0) + 1
        x = self._x.pop(name)
        if self._inside:
            own = None if self._masks is None else self._masks.get(name)
            return None if own is None else self._masked(name, x @ self.parts.V[name], y, own)
        plan = self.plans[-1] if self.plans and name in self.plans[-1].sites else None
        acts_point, mask_point, delta_point = (
            self._listening(name, k) for k in ("component_acts", "mask", "delta_mask")
        )
        if plan is None and not (acts_point or mask_point or delta_point):
            return None
        acts = x @ self.parts.V[name]
        patched, acts = _through(acts_point, acts, lambda: x @ self.parts.V[name])
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

    def _planned(self, plan: Plan, name: str, acts: Tensor) -> SiteMask:
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
            check_mask(name, own, acts)
            return own
        assert plan.masks is not None
        given = plan.masks(name, acts)
        own = given if isinstance(given, SiteMask) else SiteMask(given, None)
        check_mask(name, own, acts)
        return own

    def _masked(self, name: str, acts: Tensor, y: Tensor, own: SiteMask, patched: Tensor | None = None) -> Tensor:
        return masked_output(
            y,
            acts,
            self.parts.U[name],
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
