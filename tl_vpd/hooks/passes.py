"""One forward pass of an attached model: what is captured, computed and changed at each site.

In order: a clean pass first if a mode needs importances; then at every site its input is noted (``read``), and its output is
changed (``write``) if a mode is on or somebody listens to its HookPoints; at the end every site must have run exactly once,
and importances that somebody listens to are computed from the inputs just seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_vpd.adapters import Adapter
from tl_vpd.adapters.base import savable
from tl_vpd.adapters.versions import HookPoint
from tl_vpd.decomposition import Decomposition
from tl_vpd.divergence import kl_divergence, squared_error
from tl_vpd.fingerprint import compare
from tl_vpd.hooks.importances import zero_padding
from tl_vpd.hooks.modes import masks_of_mode
from tl_vpd.hooks.parts import Parts
from tl_vpd.hooks.plans import Plan, check_mask
from tl_vpd.hooks.product import Product, listening, sparse_hooks
from tl_vpd.hooks.tapped import users_hooks_aside
from tl_vpd.importance import lower_leaky
from tl_vpd.masking import Masks, SiteMask, fresh_pgd, masks_from_sources
from tl_vpd.site import Packing

OF_PRODUCT = ("component_acts", "mask", "delta_mask")
"""The kinds of HookPoints that stand on a site's own product."""


class Passes:
    """The forward passes of an attached model. ``plans`` is a stack: the last one counts.

    Args:
        adapter: of the model. parts: V, U and Γ in the model's dtype and on its device.
        hook_points: by site and kind; what is not there is never listened to.
    """

    def __init__(
        self,
        adapter: Adapter,
        parts: Parts,
        hook_points: Mapping[str, Mapping[str, HookPoint]],
    ) -> None:
        self.adapter, self.parts, self.hook_points = adapter, parts, hook_points
        self.plain_forward = adapter.model.forward
        self.plans: list[Plan] = []
        self.owner: object = None
        """Whose passes they are: the model holds its passes, and so what is attached to it."""
        self.on = True
        self.check_weights = True
        self._processed = adapter.processed
        self._changed: set[str] | None = None
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
        return listening(self.hook_points.get(name, {}), kind)

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

    @contextmanager
    def noting_changes(self) -> Iterator[set[str]]:
        """Inside, notes which sites that write into the residual stream put out something else than the model computed."""
        before = self._changed
        self._changed = changed = set[str]()
        try:
            yield changed
        finally:
            self._changed = before

    def _before(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self.adapter.check()
        self.parts.follow(self.adapter.device, self.adapter.dtype)  # the model may have been moved or cast since
        if self.check_weights and self.adapter.processed != self._processed:
            self._check_weights()
        plan = self.plans[-1] if self.plans else None
        wants_ci = any(self._listening(name, "ci") for name in self.hook_points)
        masked = plan is not None and plan.needs_clean_pass
        if not (wants_ci or masked):
            return
        what = f"The mode {plan.mode!r}" if plan is not None and masked else "hook_ci"
        if (argument := self.adapter.truncation(arguments, keywords)) is not None:
            raise ValueError(self._truncated(what, argument))
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

    def _check_weights(self) -> None:
        """Raises if the weights that were processed after attaching are no longer the decomposed ones."""
        stored = self.parts.decomposition
        assert isinstance(stored, Decomposition)
        wrong = compare(stored.fingerprints, {name: self.adapter.weight(name) for name in self.parts.sites})
        if wrong:
            raise ValueError(
                "enable_compatibility_mode() has processed this model's weights since the decomposition was attached: "
                f"{len(wrong)} of {len(self.parts.sites)} sites are no longer the decomposed ones. Detach, and pass "
                "no_processing=True."
            )
        self._processed = self.adapter.processed

    @staticmethod
    def _truncated(what: str, argument: str) -> str:
        return f"{what} needs every site's input, and {argument} skips blocks: leave {argument} out."

    def _clean(
        self, arguments: tuple[Any, ...], keywords: dict[str, Any], return_type: str | None = None
    ) -> tuple[Any, Float[Tensor, "batch *pos C_total"]]:
        """A clean pass on the same arguments: its output and, through the users' hooks, its importances."""
        self._inputs = {}
        with self._own_pass(), torch.no_grad():
            output = self.adapter.call(arguments, keywords, return_type)
        return output, self._fire_importances()

    def _clean_output(self, arguments: tuple[Any, ...], keywords: dict[str, Any], like: Plan) -> tuple[Any, Tensor]:
        """A clean pass whose importances are the plan's own: 1 for what it keeps."""
        self._inputs = {}
        with self._own_pass(), torch.no_grad():
            output = self.adapter.call(arguments, keywords, "logits")
        first = next(iter(self._inputs.values()))
        if any(self._listening(name, "ci") for name in self.hook_points):
            self._fire_importances()
        self._inputs = None
        g = first.new_zeros(*first.shape[:-1], self.parts.packing.total)
        return output, like.indicator(g, self.parts.packing)

    def _find_masks(self, plan: Plan, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Masks:
        """The clean pass that a mode needs, and the masks made from its importances."""
        assert plan.mode is not None
        attacked = plan.mode == "adversarial"
        if plan.kept is None:
            output, g = self._clean(arguments, keywords, "logits" if attacked else None)
        else:
            output, g = self._clean_output(arguments, keywords, plan)
        if attacked and not isinstance(output, Tensor):
            raise TypeError(
                f"The adversarial mode attacks the model's output, which must be a tensor and is a {type(output).__name__}."
            )
        if not attacked:
            return self._chosen(
                plan,
                masks_of_mode(
                    plan.mode,
                    g,
                    self.parts.packing,
                    threshold=plan.threshold,
                    delta=plan.delta,
                    generator=plan.generator,
                ),
            )
        # Under inference_mode the attack needs copies that autograd may save.
        with torch.inference_mode(False):
            arguments, keywords = tuple(map(savable, arguments)), {k: savable(v) for k, v in keywords.items()}
            constant, keep = savable(g.detach()), savable(self._keep())
            target = savable(output).float()
            target = target.log_softmax(-1) if self.adapter.return_types else target
        divergence = kl_divergence if self.adapter.return_types else squared_error

        def loss(sources: Tensor) -> Tensor:
            self._masks = self._chosen(plan, masks_from_sources(constant, sources, self.parts.packing))
            return divergence(target, self.adapter.call(arguments, keywords, "logits"), keep)

        width = self.parts.packing.total + len(self.parts.packing.names)
        shape = (*[1] * (g.ndim - 1), width)
        start = torch.rand(*shape, generator=plan.generator, device=self.adapter.device).to(g.dtype)
        with self._own_pass(), torch.inference_mode(False):
            found = fresh_pgd(loss, start, steps=plan.steps, step_size=plan.step_size)
        return self._chosen(plan, masks_from_sources(g, found.sources, self.parts.packing))

    def _chosen(self, plan: Plan, masks: Masks) -> Masks:
        """Masks at the plan's sites and positions."""
        chosen = masks.only([name for name in self.parts.sites if name in plan.sites])
        return Masks({n: plan.at_positions(n, own, own.mask) for n, own in chosen.items()})  # type: ignore[arg-type]

    @contextmanager
    def _own_pass(self) -> Iterator[None]:
        """Runs of the model on the plugin's own behalf: users' passing hooks are not called, nor are ours."""
        self._inside = True
        try:
            with users_hooks_aside(self.adapter):
                yield
        finally:
            self._inside = False
            self._x.clear()
            self._fired.clear()

    def _keep(self) -> Tensor | None:
        return self.adapter.padding(self._tokens, self._attention_mask)

    def _fire_importances(self) -> Float[Tensor, "batch *pos C_total"]:
        """Γ on the inputs just collected, sent through the users' hooks on ``hook_ci``."""
        assert self._inputs is not None
        self._check_each_once({n: int(n in self._inputs) for n in self.parts.sites})
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
        if self.adapter.completed(arguments, keywords):
            self._check_each_once({n: self._fired.get(n, 0) for n in self.parts.sites})
        elif self._inputs is not None:
            raise ValueError(self._truncated("hook_ci", "stop_at_layer"))
        if self._inputs is not None:
            self._fire_importances()

    @staticmethod
    def _check_each_once(fired: Mapping[str, int]) -> None:
        wrong = {name: times for name, times in fired.items() if times != 1}
        if wrong:
            raise RuntimeError(
                f"In this forward pass these sites ran another number of times than once: {wrong}. Masks and hooks "
                "would not act; the model computes them in a way that is not supported."
            )

    def see_tokens(self, tokens: Tensor | None) -> None:
        self._tokens = tokens

    def see_attention_mask(self, attention_mask: Tensor | None) -> None:
        self._attention_mask = attention_mask

    def read(self, name: str, x: Tensor) -> None:
        self._x[name] = x
        if self._inputs is not None:
            self._inputs[name] = self._input_of(name, x)

    def _input_of(self, name: str, x: Tensor) -> Tensor:
        """The site's one input; sites that read the same tensor share it, so that Γ normalises it once."""
        layout = self.adapter.layout(name)
        return x if not (layout.by_head or layout.x_has_heads) else layout.input_of_site(x)

    def write(self, name: str, y: Tensor) -> Tensor | None:
        noted = self._changed is not None and not self._inside and name.endswith(("W_O", "W_out"))
        # Without gradients y itself may be used up, and is then no witness any more.
        before = y.clone() if noted and not torch.is_grad_enabled() else y
        output = self._written(name, y)
        if noted and output is not None and not torch.equal(output, before):
            self._changed.add(name)  # type: ignore[union-attr]
        return output

    def _written(self, name: str, y: Tensor) -> Tensor | None:
        x = self._x.pop(name, None)
        if x is None:  # a second HookPoint for the same product, as some versions fire
            return None
        self._fired[name] = self._fired.get(name, 0) + 1
        if self._inside:
            own = None if self._masks is None else self._masks.get(name)
            if own is None:
                return None
            product = Product(name, self.adapter, self.parts, x, y)
            return product.masked(product.acts(), own)
        plan = self.plans[-1] if self.plans and name in self.plans[-1].sites else None
        points = {kind: self._listening(name, kind) for kind in OF_PRODUCT}
        if plan is None and not any(points.values()):
            return None
        product = Product(name, self.adapter, self.parts, x, y)
        if plan is not None:
            return product.hooked(points, partial(self._planned, plan, name))
        if (few := sparse_hooks(points, self.parts.packing.counts[name])) is not None:
            return product.sparse(*few, points)
        return product.hooked(points, None)

    def _planned(self, plan: Plan, name: str, acts: Tensor) -> SiteMask:
        """What the innermost masked context wants of this site in this pass."""
        if plan.needs_clean_pass:
            if self._masks is None:
                raise RuntimeError("Masks need the clean pass that comes first: call model(...) or model.forward(...).")
            return self._masks[name]
        if plan.mode is not None:
            one = Packing({name: acts.shape[-1]})
            g = acts.detach() if plan.kept is None else plan.indicator(acts.detach(), one)
            own = masks_of_mode(
                plan.mode, g, one, threshold=plan.threshold, delta=plan.delta, generator=plan.generator
            )[name]
        elif isinstance(plan.masks, Masks):
            own = plan.masks.get(name, SiteMask(None, None))
        else:
            assert plan.masks is not None
            given = plan.masks(name, acts)
            own = given if isinstance(given, SiteMask) else SiteMask(given, None)
        check_mask(name, own, acts)
        return plan.at_positions(name, own, acts)
