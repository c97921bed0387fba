"""The forward passes of an attached model: what comes before one, what happens at each site in it, and what comes after.

Before: a clean pass, if a mode needs importances or somebody listens to ``hook_ci`` while a mode is on. In it: every site's output
goes through its HookPoints and through the innermost mask spec, if either wants anything of it. After: every site must have run
exactly once, and importances that somebody listens to are computed from the inputs just read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_vpd.adapters import Adapter
from tl_vpd.adapters.base import savable
from tl_vpd.adapters.versions import HookPoint
from tl_vpd.components.fingerprint import compare
from tl_vpd.forward import CastWeights, SitePass, SiteProduct, SiteTaps
from tl_vpd.forward.quiet import users_hooks_aside
from tl_vpd.hooks.importances import zero_padding
from tl_vpd.hooks.mask_spec import MaskSpec, check_mask
from tl_vpd.hooks.site_hooks import hooked_output, listening, sparse_hooks, sparse_output
from tl_vpd.importance import DecomposedWeights, lower_leaky
from tl_vpd.losses import Reconstruction
from tl_vpd.masking import Masks, SiteMask, attacked_masks
from tl_vpd.masking.modes import masks_of_mode
from tl_vpd.site import ConcatenatedAxis

OF_PRODUCT = ("component_acts", "mask", "delta_mask")
"""The kinds of HookPoints that stand on a site's product."""


@dataclass
class Call:
    """One call of the model's ``forward`` by its user.

    ``tokens`` and ``attention_mask`` are noted when the layers get them; ``masks`` are those of a mode that needs a clean pass.
    """

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    tokens: Tensor | None = None
    attention_mask: Tensor | None = None
    masks: Masks | None = None


class AttachedForward:
    """The forward passes of an attached model. ``specs`` is a stack: the last one counts.

    Args:
        adapter: of the model.
        weights: V, U and Γ in the model's dtype and on its device.
        hook_points: by site and kind; what is not there is never listened to.
    """

    def __init__(
        self, adapter: Adapter, weights: CastWeights, hook_points: Mapping[str, Mapping[str, HookPoint]]
    ) -> None:
        self.adapter, self.weights, self.hook_points = adapter, weights, hook_points
        self.taps = SiteTaps(adapter, list(weights.sites))
        self.plain_forward = adapter.model.forward
        self.specs: list[MaskSpec] = []
        self.owner: object = None
        """Whose passes they are: the model holds its passes, and so what is attached to it."""
        self.on = True
        self.check_weights = True
        self._processed = adapter.processed
        self._changed: set[str] | None = None
        self._call: Call | None = None
        self._inside = False

    # -- calls -------------------------------------------------------------------------------------------------------

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """Stands in for the model's ``forward``: ``run_with_hooks`` and ``generate`` call that without the model's hooks."""
        if self._inside or not self.on:
            return self.plain_forward(*arguments, **keywords)
        call = Call(arguments, keywords)
        with self._during(call):
            run = SitePass(partial(self._output, call), collect=self._before(call))
            with self.taps.during(run):
                output = self.plain_forward(*arguments, **keywords)
            self._after(call, run)
            return output

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, the model runs as if nothing were attached, even from a hook in the middle of a forward pass."""
        before = self._call, self._inside
        self._call, self._inside = None, True
        try:
            with self.taps.during(None):
                yield
        finally:
            self._call, self._inside = before

    @contextmanager
    def noting_changes(self) -> Iterator[set[str]]:
        """Inside, notes which sites that write into the residual stream put out something else than the model computed."""
        before = self._changed
        self._changed = changed = set[str]()
        try:
            yield changed
        finally:
            self._changed = before

    def see_tokens(self, tokens: Tensor | None) -> None:
        """Notes the tokens that the layers get."""
        if self._call is not None:
            self._call.tokens = tokens

    def see_attention_mask(self, attention_mask: Tensor | None) -> None:
        """Notes the attention mask that the layers get."""
        if self._call is not None:
            self._call.attention_mask = attention_mask

    @contextmanager
    def _during(self, call: Call) -> Iterator[None]:
        before, self._call = self._call, call
        try:
            yield
        finally:
            self._call = before

    @contextmanager
    def _internal(self, run: SitePass) -> Iterator[None]:
        """Runs of the model on the package's behalf: users' passing hooks are not called, nor are ours."""
        before, self._inside = self._inside, True
        try:
            with users_hooks_aside(self.adapter), self.taps.during(run):
                yield
        finally:
            self._inside = before

    # -- before and after --------------------------------------------------------------------------------------------

    def _before(self, call: Call) -> bool:
        """Runs the clean pass that a mode needs; whether this very pass is the clean one that ``hook_ci`` needs."""
        self.adapter.check()
        self.weights.follow(self.adapter.device, self.adapter.dtype)  # the model may have been moved or cast since
        if self.check_weights and self.adapter.processed != self._processed:
            self._check_weights()
        spec = self.specs[-1] if self.specs else None
        masked = spec is not None and spec.needs_clean_pass
        if not (masked or self._wants_importances()):
            return False
        purpose = f"The mode {spec.mode!r}" if spec is not None and masked else "hook_ci"
        if (argument := self.adapter.truncation(call.arguments, call.keywords)) is not None:
            raise ValueError(_truncated(purpose, argument))
        if self.adapter.kv_cache(call.arguments, call.keywords) is not None:
            raise ValueError(
                f"{purpose} needs the whole prefix at every step, which a KV cache leaves out: generate with "
                "use_past_kv_cache=False."
            )
        if spec is None:
            return True
        if masked:
            call.masks = self._masks_of(spec, call)
        else:
            self._clean(call)
        return False

    def _after(self, call: Call, run: SitePass) -> None:
        if self.adapter.completed(call.arguments, call.keywords):
            self.taps.check_each_once(run)
        elif run.collect:
            raise ValueError(_truncated("hook_ci", "stop_at_layer"))
        if run.collect:
            self._importances(call, run)

    def _check_weights(self) -> None:
        """Raises if the weights that were processed after attaching are no longer the decomposed ones."""
        stored = self.weights.weights
        assert isinstance(stored, DecomposedWeights)
        wrong = compare(stored.fingerprints, {name: self.adapter.weight(name) for name in self.weights.sites})
        if wrong:
            raise ValueError(
                "enable_compatibility_mode() has processed this model's weights since the decomposition was attached: "
                f"{len(wrong)} of {len(self.weights.sites)} sites are no longer the decomposed ones. Detach, and pass "
                "no_processing=True."
            )
        self._processed = self.adapter.processed

    # -- clean passes ------------------------------------------------------------------------------------------------

    def _clean(self, call: Call, return_type: str | None = None) -> tuple[Any, Float[Tensor, "batch *pos C_total"]]:
        """A clean pass on the same arguments: its output and, through the users' hooks, its importances."""
        output, run = self._clean_run(call, return_type)
        return output, self._importances(call, run)

    def _clean_run(self, call: Call, return_type: str | None) -> tuple[Any, SitePass]:
        run = SitePass(collect=True)
        with self._internal(run), torch.no_grad():
            output = self.adapter.call(call.arguments, call.keywords, return_type)
        self.taps.check_each_once(run)
        return output, run

    def _importances(self, call: Call, run: SitePass) -> Float[Tensor, "batch *pos C_total"]:
        """Γ on the inputs of a clean pass, sent through the users' hooks on ``hook_ci``."""
        token_mask = self._token_mask(call)
        g = zero_padding(lower_leaky(self.weights.pre_sigmoid(run.inputs, token_mask)), token_mask)
        listeners = {name: self._listening(name, "ci") for name in self.weights.sites}
        if not any(listeners.values()):
            return g
        by_site = self.weights.site_axis.split_sites(g)
        return torch.cat(
            [point(by_site[n].clone()) if (point := listeners[n]) else by_site[n] for n in by_site], dim=-1
        )

    def _token_mask(self, call: Call) -> Tensor | None:
        return self.adapter.padding(call.tokens, call.attention_mask)

    def _masks_of(self, spec: MaskSpec, call: Call) -> Masks:
        """The clean pass that a mode needs, and the masks made from its importances."""
        assert spec.mode is not None
        attacked = spec.mode == "adversarial"
        site_axis = self.weights.site_axis
        if spec.node_set is None:
            output, g = self._clean(call, "logits" if attacked else None)
        else:
            output, run = self._clean_run(call, "logits")
            if self._wants_importances():
                self._importances(call, run)
            first = next(iter(run.inputs.values()))
            g = spec.indicator(first.new_zeros(*first.shape[:-1], site_axis.total), site_axis)
        if not attacked:
            masks = masks_of_mode(
                spec.mode, g, site_axis, threshold=spec.threshold, delta=spec.delta, generator=spec.generator
            )
            return self._chosen(spec, masks)
        if not isinstance(output, Tensor):
            raise TypeError(
                f"The adversarial mode attacks the model's output, which must be a tensor and is a {type(output).__name__}."
            )
        return self._attacked(spec, call, output, g)

    def _attacked(self, spec: MaskSpec, call: Call, output: Tensor, g: Tensor) -> Masks:
        """The masks of the adversarial mode."""
        # Under inference_mode the attack needs copies that autograd may save.
        with torch.inference_mode(False):
            arguments = tuple(map(savable, call.arguments))
            keywords = {k: savable(v) for k, v in call.keywords.items()}
            token_mask = savable(self._token_mask(call))
            constant = savable(g.detach())
            distance = Reconstruction(savable(output), "kl" if self.adapter.return_types else "mse", token_mask)

        def loss(masks: Masks) -> Tensor:
            with self._internal(SitePass(partial(self._masked, self._chosen(spec, masks)))):
                return distance(self.adapter.call(arguments, keywords, "logits"))

        with torch.inference_mode(False):
            masks = attacked_masks(
                constant,
                self.weights.site_axis,
                loss,
                steps=spec.steps,
                step_size=spec.step_size,
                generator=spec.generator,
            )
        return self._chosen(spec, masks)

    def _chosen(self, spec: MaskSpec, masks: Masks) -> Masks:
        """Masks at the spec's sites and positions."""
        chosen = masks.only([name for name in self.weights.sites if name in spec.sites])
        return Masks({n: spec.at_positions(n, mask, mask.mask) for n, mask in chosen.items()})  # type: ignore[arg-type]

    # -- at each site ------------------------------------------------------------------------------------------------

    def _masked(self, masks: Masks, name: str, x: Tensor, y: Tensor) -> Tensor | None:
        """A site's output in an internal pass."""
        if name not in masks:
            return None
        return SiteProduct(name, self.adapter, self.weights, x, y).masked(masks[name])

    def _output(self, call: Call, name: str, x: Tensor, y: Tensor) -> Tensor | None:
        """A site's output in a user's pass."""
        noted = self._changed is not None and name.endswith(("W_O", "W_out"))
        # Without gradients y itself may be used up, and is then no witness any more.
        before = y.clone() if noted and not torch.is_grad_enabled() else y
        output = self._hooked(call, name, x, y)
        if noted and output is not None and not torch.equal(output, before):
            self._changed.add(name)  # type: ignore[union-attr]
        return output

    def _hooked(self, call: Call, name: str, x: Tensor, y: Tensor) -> Tensor | None:
        spec = self.specs[-1] if self.specs and name in self.specs[-1].sites else None
        points = {kind: self._listening(name, kind) for kind in OF_PRODUCT}
        if spec is None and not any(points.values()):
            return None
        product = SiteProduct(name, self.adapter, self.weights, x, y)
        if spec is not None:
            return hooked_output(product, points, partial(self._mask_of, call, spec, name))
        if (few := sparse_hooks(points, self.weights.site_axis.counts[name])) is not None:
            return sparse_output(product, *few, points)
        return hooked_output(product, points, None)

    def _mask_of(self, call: Call, spec: MaskSpec, name: str, acts: Tensor) -> SiteMask:
        """What the innermost mask spec wants of this site in this pass."""
        if spec.needs_clean_pass:
            if call.masks is None:
                raise RuntimeError("Masks need the clean pass that comes first: call model(...) or model.forward(...).")
            return call.masks[name]
        if spec.mode is not None:
            one = ConcatenatedAxis({name: acts.shape[-1]})
            g = acts.detach() if spec.node_set is None else spec.indicator(acts.detach(), one)
            mask = masks_of_mode(
                spec.mode, g, one, threshold=spec.threshold, delta=spec.delta, generator=spec.generator
            )[name]
        elif isinstance(spec.masks, Masks):
            mask = spec.masks.get(name, SiteMask(None, None))
        else:
            assert spec.masks is not None
            given = spec.masks(name, acts)
            mask = given if isinstance(given, SiteMask) else SiteMask(given, None)
        check_mask(name, mask, acts)
        return spec.at_positions(name, mask, acts)

    def _listening(self, name: str, kind: str) -> HookPoint | None:
        return listening(self.hook_points.get(name, {}), kind)

    def _wants_importances(self) -> bool:
        return any(self._listening(name, "ci") for name in self.hook_points)


def _truncated(purpose: str, argument: str) -> str:
    return f"{purpose} needs every site's input, and {argument} skips blocks: leave {argument} out."
