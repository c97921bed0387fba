"""The forward passes of an attached model: what comes before one, what happens at each site in it, and what comes after.

Before: a clean pass, if a mode needs importances or somebody listens to ``hook_ci`` while a mode is on. In it: every site's
output goes through its HookPoints and the innermost mask spec. After: every site must have run exactly once, and importances
that somebody listens to are computed from the inputs just read.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tl_vpd.adapters import Adapter
from tl_vpd.adapters.changes import Later
from tl_vpd.adapters.taps import OnModel
from tl_vpd.forward import CastWeights, SiteEdit, SitePass, SiteProduct
from tl_vpd.forward.target_check import check_target
from tl_vpd.forward.turns import in_backward, turn, turns_of
from tl_vpd.hooks.internal_passes import Call, HookPoints, InternalPasses
from tl_vpd.hooks.mask_spec import MaskSpec, mask_from_function
from tl_vpd.hooks.mode_masks import masks_of_call
from tl_vpd.hooks.prefixes import CleanPrefix, CleanPrefixes
from tl_vpd.hooks.site_hooks import hooked_output, sparse_hooks, sparse_output
from tl_vpd.importance import DecomposedWeights
from tl_vpd.masking import Masks, SiteMask
from tl_vpd.masking.modes import masks_of_mode
from tl_vpd.site import ConcatenatedAxis

OF_PRODUCT = ("component_acts", "mask", "delta_mask")
"""The kinds of HookPoints that stand on a site's product."""
STREAM = ("W_O", "W_out")
"""The ends of the names of sites that write into the residual stream."""


class AttachedForward(InternalPasses, OnModel):
    """The forward passes of an attached model.

    Args:
        adapter: of the model.
        weights: V, U and Γ in the model's dtype and on its device.
        hook_points: by site and kind; what is not there is never listened to.

    Attributes:
        plain: the model's ``forward``.
        specs: those of the masked contexts; the last one counts.
        contexts: of masks and of hooks: the thread of each, and its spec.
        owner: whose passes they are: the model holds its passes, and so what is attached to it.
        on: whether the decomposition is attached.
    """

    def __init__(self, adapter: Adapter, weights: CastWeights, hook_points: HookPoints) -> None:
        super().__init__(adapter, weights, hook_points)
        self.plain = adapter.model.forward
        self.turns = turns_of(adapter.model)
        self.specs: list[MaskSpec] = []
        self.contexts: list[tuple[threading.Thread, MaskSpec | None]] = []
        self.owner: object = None
        self.on = True
        self.prefixes = CleanPrefixes(adapter)
        self._processed = adapter.processed
        self._changed: set[str] | None = None

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """Replaces the model's ``forward``: ``run_with_hooks`` and ``generate`` call that without the model's hooks."""
        if torch.compiler.is_compiling():
            return self._pass(arguments, keywords)
        use = object()
        try:
            self.turns.begin(use)
            if self.turns.only(use):
                self.forget()
            if not self._inside:
                self.refuse_other_threads()
            return self._pass(arguments, keywords)
        finally:
            self.turns.end(use)

    def _pass(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if self._inside or not self.on:
            return self.plain(*arguments, **keywords)
        call = Call(arguments, keywords)
        with self._during(call):
            run = SitePass(partial(self._output, call), collect=self._before(call))
            with self.taps.during(run):
                output = self.plain(*arguments, **keywords)
            self._after(call, run, output)
            if self._changed is not None:
                self._changed.update(name for edit in self.taps.edits for name in edit if name.endswith(STREAM))
            return output

    def refuse_other_threads(self) -> None:
        """Raises RuntimeError if the model runs masked or with hooks in another thread: its calls would get those too."""
        me = threading.current_thread()
        other = next((thread for thread, _ in self.contexts if thread is not me and thread.is_alive()), None)
        if other is not None and not in_backward():
            raise RuntimeError(
                f"This model is in a context of masks or hooks in thread {other.name!r}, which would act on the calls of thread "
                f"{me.name!r} too: leave that context first, or give each thread a copy of the model."
            )

    def in_context(self, undo: Later, spec: MaskSpec | None) -> None:
        """From now on, calls of the model are this thread's alone and run masked.

        Args:
            undo: notes how to end that.
            spec: of the masks (None: calls run as they do).
        """
        with turn(self.adapter.model):  # not in the middle of another thread's pass
            self._begin_context(undo, spec)

    def _begin_context(self, undo: Later, spec: MaskSpec | None) -> None:
        self.refuse_other_threads()
        context = (threading.current_thread(), spec)
        contexts, specs = self.contexts, self.specs
        undo(lambda: contexts.remove(context) if context in contexts else None)
        contexts.append(context)
        if spec is not None:
            undo(lambda: specs.remove(spec) if spec in specs else None)
            specs.append(spec)

    def in_edit(self, undo: Later, edit: Mapping[str, SiteEdit]) -> None:
        """From now on, calls of the model are this thread's alone, and their sites have changed weights.

        Args:
            undo: notes how to end that.
            edit: the changes by site, in addition to those of the contexts around.
        """
        with turn(self.adapter.model):
            self._begin_context(undo, None)
            for edits in (self.taps.edits, self.weights.U.edits):
                undo(partial(_remove, edits, edit))
                edits.append(edit)

    @contextmanager
    def noting_changes(self) -> Iterator[set[str]]:
        """Inside, notes which sites that write into the residual stream had another output than the model computed."""
        before = self._changed
        self._changed = changed = set[str]()
        try:
            yield changed
        finally:
            self._changed = before

    @contextmanager
    def _during(self, call: Call) -> Iterator[None]:
        before, self._call = self._call, call
        try:
            yield
        finally:
            self._call = before

    # -- before and after --------------------------------------------------------------------------------------------

    def _before(self, call: Call) -> bool:
        """Runs the clean pass that a mode needs; whether this pass is the clean one that ``hook_ci`` needs."""
        self.adapter.check()
        self.weights.follow(self.adapter.device, self.adapter.dtype)  # the model may have been moved or cast since
        if self.adapter.processed != self._processed:
            self._check_weights()
        spec = self.specs[-1] if self.specs else None
        masked = spec is not None and spec.needs_clean_pass
        if not (masked or self.wants_importances()):
            return False
        purpose = f"The mode {spec.mode!r}" if spec is not None and masked else "hook_ci"
        if (argument := self.adapter.truncation(call.arguments, call.keywords)) is not None:
            raise ValueError(_truncated(purpose, argument, asked=not masked))
        needs_gamma = spec is None or spec.node_set is None or self.wants_importances()
        call.prefix = self._prefix(call, purpose, needs_gamma=needs_gamma)
        if call.prefix is not None:
            call.prefix.follow(masked=spec is not None)
        if spec is None:
            return True
        if masked:
            call.masks = masks_of_call(self, spec, call)
        else:
            self.importances(call, self.clean(call)[1])
        return False

    def _prefix(self, call: Call, purpose: str, *, needs_gamma: bool) -> CleanPrefix | None:
        """The clean run of what is in the call's KV cache; None where the call has no cache."""
        cache = self.adapter.kv_cache(call.arguments, call.keywords)
        if cache is None and not self.adapter.makes_kv_cache(call.arguments, call.keywords):
            return None
        assert isinstance(self.weights.weights, DecomposedWeights)
        if not (needs_gamma and self.weights.weights.gamma_config.reads_the_future):
            return self.prefixes.of(cache)
        if cache is None:
            return None
        raise ValueError(
            f"{purpose} needs the whole prefix at every step, since this decomposition's Γ is bidirectional, and a KV cache "
            "leaves it out: generate with use_past_kv_cache=False, or train one with GammaConfig(causal=True)."
        )

    def _after(self, call: Call, run: SitePass, output: Any) -> None:
        if self.adapter.completed(call.arguments, call.keywords):
            self.taps.check_each_once(run)
        elif run.collect:
            raise ValueError(_truncated("hook_ci", "stop_at_layer", asked=True))
        if run.collect:
            self.extend_prefix(call, run)
            self.importances(call, run)
        makes = call.prefix is not None and self.adapter.kv_cache(call.arguments, call.keywords) is None
        if makes and (made := self.adapter.made_kv_cache(output)) is not None:
            self.prefixes.keep(made, call.prefix)  # type: ignore[arg-type]

    def _check_weights(self) -> None:
        """Raises if the weights that were processed after attaching are no longer the decomposed ones."""
        try:
            check_target(self.weights.weights, self.adapter)
        except ValueError as error:
            raise ValueError(
                "enable_compatibility_mode() has processed this model's weights since the decomposition was attached: they are "
                "no longer the decomposed ones. Detach, and pass no_processing=True."
            ) from error
        self._processed = self.adapter.processed

    # -- at each site ------------------------------------------------------------------------------------------------

    def _output(self, call: Call, name: str, x: Tensor, y: Tensor) -> Tensor | None:
        """A site's output in a user's pass."""
        noted = self._changed is not None and name.endswith(STREAM)
        output = self._hooked(call, name, x, y)
        if noted and output is not None and not torch.equal(output, y):
            self._changed.add(name)  # type: ignore[union-attr]
        return output

    def _hooked(self, call: Call, name: str, x: Tensor, y: Tensor) -> Tensor | None:
        spec = self.specs[-1] if self.specs and name in self.specs[-1].sites else None
        points = {kind: self.listening(name, kind) for kind in OF_PRODUCT}
        if spec is None and not any(points.values()):
            return None
        product = SiteProduct(name, self.adapter, x, y, self.weights.V[name], self.weights.U[name])
        if spec is not None:
            return hooked_output(product, points, partial(self._mask_of, call, spec, name))
        if (few := sparse_hooks(points, self.weights.site_axis.counts[name])) is not None:
            return sparse_output(product, *few, points)
        return hooked_output(product, points, None)

    def _mask_of(self, call: Call, spec: MaskSpec, name: str, acts: Tensor) -> SiteMask:
        """The innermost mask spec's mask of this site in this pass."""
        if spec.needs_clean_pass:
            if call.masks is None:
                raise RuntimeError("Masks need the clean pass that comes first: call model(...) or model.forward(...).")
            return call.masks[name]
        if spec.mode is None:
            assert spec.masks is not None
            if isinstance(spec.masks, Masks):
                mask = (
                    spec.masks[name]
                    if name in spec.masks
                    else SiteMask(None, None).fitted(name, acts.shape, acts.device)
                )
            else:
                mask = mask_from_function(spec.masks, name, acts)
            return spec.limited(name, mask, acts)
        site_axis = ConcatenatedAxis({name: acts.shape[-1]})
        g = acts.detach() if spec.node_set is None else spec.indicator(acts.detach(), site_axis)
        mask = masks_of_mode(spec.mode, g, site_axis, delta=spec.options.delta, generator=spec.generator)[name]
        return spec.limited(name, mask, acts, self.token_mask(call))


def _truncated(purpose: str, argument: str, *, asked: bool) -> str:
    other = ", or do not cache or hook hook_ci (names_filter=..., or attach(..., hooks=...))" if asked else ""
    return f"{purpose} needs every site's input, and {argument} skips blocks: leave {argument} out{other}."


def _remove(edits: list[Mapping[str, SiteEdit]], edit: Mapping[str, SiteEdit]) -> None:
    """Takes an edit out of a list, if it is in it."""
    edits[:] = [other for other in edits if other is not edit]
