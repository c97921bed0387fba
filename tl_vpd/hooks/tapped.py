"""A model run with masks, without HookPoints: what training, evaluation and adversaries stand on.

    >>> with TappedModel(decomposition, model) as tapped:           # doctest: +SKIP
    ...     logits, inputs = tapped.clean(tokens)                   # the target itself, and every site's input
    ...     masked = tapped.masked(tokens, masks)                   # the same model with masked subcomponents

Hooks that users left on the model are set aside during these runs (permanent ones stay: they are part of the model) and
the target's weights collect no gradients.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from tl_vpd.adapters import Adapter, adapt
from tl_vpd.components import Components, OpenPass, SourcedPass
from tl_vpd.decomposition import Decomposition
from tl_vpd.hooks.parts import Parts
from tl_vpd.hooks.product import Product
from tl_vpd.hooks.registry import attached_to
from tl_vpd.masking import Masks, SiteMask
from tl_vpd.site import nearest


@contextmanager
def frozen(adapter: Adapter) -> Iterator[None]:
    """The model in eval mode and without gradients for its weights; both are put back as they were."""
    modes = [(m, m.training) for m in adapter.modules()]
    parameters = [(p, p.requires_grad) for m, _ in modes for p in m.parameters(recurse=False)]
    try:
        for p, _ in parameters:
            p.requires_grad_(False)
        for m, _ in modes:
            m.training = False
        yield
    finally:
        for p, flag in parameters:
            p.requires_grad_(flag)
        for m, training in modes:
            m.training = training


@contextmanager
def users_hooks_aside(adapter: Adapter) -> Iterator[None]:
    """Sets aside every HookPoint's hooks that are not permanent, and puts back the very same dictionaries.

    A clean pass must see the target, not the user's patches. Hooks on other modules (the decomposition's taps among them)
    are left alone.
    """
    saved: list[tuple[nn.Module, dict[int, Any], dict[int, Any]]] = []
    for module in adapter.modules():
        handles = [*getattr(module, "fwd_hooks", ()), *getattr(module, "bwd_hooks", ())]
        transient = {h.hook.id for h in handles if not h.is_permanent}
        if transient:
            forward, backward = module._forward_hooks, module._backward_hooks
            saved.append((module, forward, backward))
            module._forward_hooks = OrderedDict((k, f) for k, f in forward.items() if k not in transient)
            module._backward_hooks = OrderedDict((k, f) for k, f in backward.items() if k not in transient)
    try:
        yield
    finally:
        for module, forward, backward in saved:
            module._forward_hooks, module._backward_hooks = forward, backward


class TappedModel:
    """Taps on a model's sites, for clean and masked passes. A context manager: leaving it takes the taps off.

    Args:
        decomposition: its V and U are read at every pass, so that training sees its own updates (Components will do).
        model: the target; it must be on the decomposition's device.
        fused_attention: whether attention that nobody hooks may be computed in one call (the same to rounding, not to the bit).

    Raises:
        KeyError: the model does not have a site of the decomposition.
    """

    def __init__(
        self, decomposition: Decomposition | Components, model: nn.Module, *, fused_attention: bool = False
    ) -> None:
        self.model = model
        self.fused_attention = fused_attention
        self.adapter = adapt(model)
        self.parts = Parts(decomposition, self.adapter.device, self.adapter.dtype)
        self.names = list(self.parts.sites)
        for name in self.names:
            if name not in self.adapter.sites:
                near = nearest(name, self.adapter.sites)
                raise KeyError(f"This model has no {name}{near} to take apart: the decomposition is of another model.")
        self._inputs: dict[str, Tensor] | None = None
        self._masks: Masks | SourcedPass | OpenPass | None = None
        self._constant_parts = False
        self._x: dict[str, Tensor] = {}
        self._fired: Counter[str] = Counter()
        self._stack = ExitStack()

    def __enter__(self) -> TappedModel:
        try:
            self._stack.enter_context(frozen(self.adapter))
            self._stack.enter_context(users_hooks_aside(self.adapter))
            for name in self.names:
                for handle in self.adapter.tap(name, partial(self._read, name), partial(self._write, name)):
                    self._stack.callback(handle.remove)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()

    def clean(
        self, tokens: Shaped[Tensor, "batch ..."], keep: Bool[Tensor, "batch pos"] | None = None
    ) -> tuple[Float[Tensor, "batch ..."], dict[str, Float[Tensor, "batch ..."]]]:
        """The target's logits and every site's input, without gradients."""
        self._inputs, self._masks = {}, None
        try:
            with torch.no_grad():
                logits = self._run(tokens, keep)
            return logits, self._inputs
        finally:
            self._inputs = None

    def clean_prompts(
        self, prompts: Any, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, dict[str, Float[Tensor, "batch ..."]]]:
        """Prompts as tokens, where they are real (None: everywhere), and every site's input on them.

        Raises:
            ValueError: the prompts are empty, too long, or not this model's tokens.
        """
        tokens = self.adapter.tokens(prompts)
        keep = self.adapter.padding(tokens, attention_mask)
        return tokens, keep, self.clean(tokens, keep)[1]

    def masked(
        self,
        tokens: Shaped[Tensor, "batch ..."],
        masks: Masks | SourcedPass | OpenPass,
        keep: Bool[Tensor, "batch pos"] | None = None,
        *,
        constant_parts: bool = False,
        checkpoint: bool = False,
    ) -> Float[Tensor, "batch ..."]:
        """Logits under masks, or under a pass's sources.

        With ``constant_parts``, gradients reach the masks but not V and U (an adversary's steps). With ``checkpoint``, a
        layer's activations are not kept for backward but computed again in it.
        """
        with self._under(masks, constant_parts), self._recomputing(keep) if checkpoint else nullcontext():
            return self._run(tokens, keep)

    @contextmanager
    def _under(self, masks: Masks | SourcedPass | OpenPass, constant_parts: bool) -> Iterator[None]:
        self._masks, self._constant_parts = masks, constant_parts
        try:
            yield
        finally:
            self._masks = None
            self._x.clear()

    @contextmanager
    def _recomputing(self, keep: Tensor | None) -> Iterator[None]:
        """Layers that keep only their inputs; computed again, they see the masks of the pass they belong to."""
        masks, constant_parts = self._masks, self._constant_parts
        assert masks is not None

        @contextmanager
        def again() -> Iterator[None]:
            with self._paused(), self._fused(keep), self._under(masks, constant_parts):
                yield

        def kept_small(block: nn.Module) -> Callable[..., Any]:
            return partial(
                torch.utils.checkpoint.checkpoint,
                block.forward,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=lambda: (nullcontext(), again()),
            )

        blocks = self.adapter.blocks()
        own = [block.__dict__.get("forward") for block in blocks]
        for block in blocks:
            block.forward = kept_small(block)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for block, before in zip(blocks, own, strict=True):
                if before is None:
                    del block.forward
                else:
                    block.forward = before  # type: ignore[method-assign]

    def _fused(self, keep: Tensor | None) -> AbstractContextManager[None]:
        return self.adapter.fused_attention() if self.fused_attention and keep is None else nullcontext()

    def _paused(self) -> AbstractContextManager[Any]:
        attached = attached_to(self.model)
        return nullcontext() if attached is None else attached.paused()

    def _run(self, tokens: Tensor, keep: Tensor | None) -> Tensor:
        self._fired.clear()
        with self._paused(), self._fused(keep):
            logits = self.adapter.run(tokens, keep)
        wrong = {n: self._fired[n] for n in self.names if self._fired[n] != 1}
        if wrong:
            raise RuntimeError(
                f"In one forward pass these sites ran another number of times than once: {wrong}. The model does not "
                "compute them the way its adapter expects, so masks would not act."
            )
        return logits

    def _read(self, name: str, x: Tensor) -> None:
        self._x[name] = x
        if self._inputs is not None:
            layout = self.adapter.layout(name)
            self._inputs[name] = layout.input_of_site(x) if layout.by_head or layout.x_has_heads else x

    def _write(self, name: str, y: Tensor) -> Tensor | None:
        x = self._x.pop(name, None)
        if x is None:  # a second HookPoint for the same product, as some versions fire
            return None
        self._fired[name] += 1
        if self._masks is None or name not in self._masks:
            return None
        with self.parts.constant() if self._constant_parts else nullcontext():
            if isinstance(self._masks, SourcedPass | OpenPass):
                return self._sourced(self._masks, name, x, y)
            product = Product(name, self.adapter, self.parts, x, y)
            return product.masked(product.acts(), self._masks[name])

    def _sourced(self, run: SourcedPass | OpenPass, name: str, x: Tensor, y: Tensor) -> Tensor:
        layout = self.adapter.layout(name)
        if layout.by_head or layout.repeats > 1:
            product = Product(name, self.adapter, self.parts, x, y)
            routed = None if run.routing is None else run.routing[name]
            return product.masked(product.acts(), SiteMask(*run.mask(name), routed))
        output = run.product(
            name,
            layout.aligned(y, has_heads=layout.y_has_heads),
            layout.aligned(x, has_heads=layout.x_has_heads),
            self.parts.V[name],
            self.parts.U[name],
            self.adapter.bias(name),
        )
        return output.reshape(y.shape)
