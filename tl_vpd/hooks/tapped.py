"""A model run with masks, without HookPoints: what training, evaluation and adversaries stand on.

    >>> with TappedModel(decomposition, model) as tapped:           # doctest: +SKIP
    ...     logits, inputs = tapped.clean(tokens)                   # the target itself, and every site's input
    ...     masked = tapped.masked(tokens, masks)                   # the same model with masked subcomponents

Hooks that users left on the model are set aside during these runs (permanent ones stay: they are part of the model) and
the target's weights collect no gradients.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_vpd.adapters import adapt
from tl_vpd.components import Components, masked_output
from tl_vpd.decomposition import Decomposition
from tl_vpd.hooks.registry import attached_to
from tl_vpd.masking import Masks


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """The model in eval mode and without gradients for its weights; both are put back as they were."""
    parameters = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]
    try:
        for p, _ in parameters:
            p.requires_grad_(False)
        model.eval()
        yield
    finally:
        for p, flag in parameters:
            p.requires_grad_(flag)
        for m, training in modes:
            m.training = training


@contextmanager
def users_hooks_aside(model: nn.Module) -> Iterator[None]:
    """Sets aside every HookPoint's hooks that are not permanent, and puts back the very same dictionaries.

    A clean pass must see the target, not the user's patches. Hooks on other modules (the decomposition's taps among them)
    are left alone.
    """
    saved: list[tuple[nn.Module, dict[int, Any], dict[int, Any]]] = []
    for module in model.modules():
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
    """

    def __init__(self, decomposition: Decomposition | Components, model: nn.Module) -> None:
        self.parts = decomposition
        self.model = model
        self.adapter = adapt(model)
        self.names = list(self.parts.sites)
        self._inputs: dict[str, Tensor] | None = None
        self._masks: Masks | None = None
        self._constant_parts = False
        self._x: dict[str, Tensor] = {}
        self._fired: Counter[str] = Counter()
        self._stack = ExitStack()

    def __enter__(self) -> TappedModel:
        self._stack.enter_context(frozen(self.model))
        self._stack.enter_context(users_hooks_aside(self.model))
        for name in self.names:
            for handle in self.adapter.tap(name, partial(self._read, name), partial(self._write, name)):
                self._stack.callback(handle.remove)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()

    def clean(
        self, tokens: Int[Tensor, "batch pos"], keep: Bool[Tensor, "batch pos"] | None = None
    ) -> tuple[Float[Tensor, "batch pos vocab"], dict[str, Float[Tensor, "batch pos _"]]]:
        """The target's logits and every site's input, without gradients."""
        self._inputs, self._masks = {}, None
        try:
            with torch.no_grad():
                logits = self._run(tokens, keep)
            return logits, self._inputs
        finally:
            self._inputs = None

    def masked(
        self,
        tokens: Int[Tensor, "batch pos"],
        masks: Masks,
        keep: Bool[Tensor, "batch pos"] | None = None,
        *,
        constant_parts: bool = False,
    ) -> Float[Tensor, "batch pos vocab"]:
        """Logits under masks. With ``constant_parts``, gradients reach the masks but not V and U (an adversary's steps)."""
        self._masks, self._constant_parts = masks, constant_parts
        try:
            return self._run(tokens, keep)
        finally:
            self._masks = None
            self._x.clear()

    def _run(self, tokens: Tensor, keep: Tensor | None) -> Tensor:
        self._fired.clear()
        attached = attached_to(self.model)
        with nullcontext() if attached is None else attached.paused():
            logits = self.model(tokens, return_type="logits", attention_mask=None if keep is None else keep.long())
        wrong = {n: self._fired[n] for n in self.names if self._fired[n] != 1}
        if wrong:
            raise RuntimeError(
                f"In one forward pass these sites ran another number of times than once: {wrong}. The model does not "
                "compute them the way its adapter expects, so masks would not act."
            )
        return logits

    def _read(self, name: str, x: Tensor) -> None:
        if self._inputs is not None:
            self._inputs[name] = x
        if self._masks is not None and name in self._masks:
            self._x[name] = x

    def _write(self, name: str, y: Tensor) -> Tensor | None:
        self._fired[name] += 1
        if self._masks is None or name not in self._masks:
            return None
        V: Tensor = self.parts.V[name]
        U: Tensor = self.parts.U[name]
        if self._constant_parts:
            V, U = V.detach(), U.detach()
        own = self._masks[name]
        acts = self._x.pop(name) @ V.to(y.dtype)
        return masked_output(
            y,
            acts,
            U.to(y.dtype),
            self.adapter.bias(name),
            mask=None if own.mask is None else own.mask.to(y.dtype),
            delta_mask=None if own.delta is None else own.delta.to(y.dtype),
            routed=own.routed,
        )
