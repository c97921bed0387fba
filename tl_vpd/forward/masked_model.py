"""A model run with masks, without HookPoints: what training, evaluation and adversaries stand on.

    >>> with MaskedModel(decomposition, model) as masked_model:     # doctest: +SKIP
    ...     logits, inputs = masked_model.clean(tokens)             # the target itself, and every site's input
    ...     masked = masked_model.masked(tokens, masks)             # the same model with masked subcomponents

Hooks that users left on the model are set aside during these runs (permanent ones stay: they are part of the model) and
the target's weights collect no gradients. Masks travel with each call; nothing of a pass is kept after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from tl_vpd.adapters import adapt
from tl_vpd.components import Components
from tl_vpd.forward.attachments import attached_to
from tl_vpd.forward.blocked import BlockedMasks
from tl_vpd.forward.cast_weights import CastWeights
from tl_vpd.forward.quiet import frozen, users_hooks_aside
from tl_vpd.forward.site_product import SiteProduct
from tl_vpd.forward.site_taps import SitePass, SiteTaps
from tl_vpd.forward.traceable import TraceableMasks
from tl_vpd.importance import DecomposedWeights
from tl_vpd.masking import Masks, SiteMask
from tl_vpd.site import nearest

AnyMasks = Masks | BlockedMasks | TraceableMasks
"""Masks as tensors (the definition), made block by block inside each product, or as operations of a graph."""


class MaskedModel:
    """A model whose sites can be masked in any pass. A context manager: leaving it takes the taps off.

    Args:
        weights: V and U are read at every pass, so that training sees its updates (Components will do: they have no Γ).
        model: the target.
        fused_attention: whether attention that nobody hooks may be computed in one call (the same to rounding, not to the bit).

    Raises:
        KeyError: the model does not have a site of the decomposition.
    """

    def __init__(
        self, weights: DecomposedWeights | Components, model: nn.Module, *, fused_attention: bool = False
    ) -> None:
        self.model = model
        self.fused_attention = fused_attention
        self.adapter = adapt(model)
        self.weights = CastWeights(weights, self.adapter.device, self.adapter.dtype)
        self.names = list(self.weights.sites)
        for name in self.names:
            if name not in self.adapter.sites:
                near = nearest(name, self.adapter.sites)
                raise KeyError(f"This model has no {name}{near} to take apart: the decomposition is of another model.")
        self.taps = SiteTaps(self.adapter, self.names)
        self._stack = ExitStack()

    def __enter__(self) -> MaskedModel:
        try:
            self._stack.enter_context(frozen(self.adapter))
            self._stack.enter_context(users_hooks_aside(self.adapter))
            for handle in self.taps.put_on():
                self._stack.callback(handle.remove)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()

    def clean(
        self, tokens: Shaped[Tensor, "batch ..."], token_mask: Bool[Tensor, "batch pos"] | None = None
    ) -> tuple[Float[Tensor, "batch ..."], dict[str, Float[Tensor, "batch ..."]]]:
        """The target's logits and every site's input, without gradients."""
        run = SitePass(collect=True)
        with torch.no_grad():
            return self.run(tokens, run, token_mask), run.inputs

    def clean_prompts(
        self, prompts: Any, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, dict[str, Float[Tensor, "batch ..."]]]:
        """Prompts as tokens, where they are real (None: everywhere), and every site's input on them.

        Raises:
            ValueError: the prompts are empty, too long, or not this model's tokens.
        """
        tokens = self.adapter.tokens(prompts)
        token_mask = self.adapter.padding(tokens, attention_mask)
        return tokens, token_mask, self.clean(tokens, token_mask)[1]

    def masked(
        self,
        tokens: Shaped[Tensor, "batch ..."],
        masks: AnyMasks,
        token_mask: Bool[Tensor, "batch pos"] | None = None,
        *,
        constant_weights: bool = False,
        checkpoint: bool = False,
    ) -> Float[Tensor, "batch ..."]:
        """Logits under masks.

        Args:
            tokens: ``[batch, pos]``, or the input of a custom model.
            masks: of the sites that are masked; the others run as they are.
            token_mask: False at padding (None: no padding).
            constant_weights: gradients reach the masks but not V and U (an adversary's steps).
            checkpoint: a layer's activations are not kept for backward but computed again in it.
        """
        function = partial(self._output, masks, constant_weights)
        with self._recomputing(function, token_mask) if checkpoint else nullcontext():
            return self.run(tokens, SitePass(function), token_mask)

    def run(self, tokens: Tensor, run: SitePass, token_mask: Tensor | None = None) -> Tensor:
        """The model's output in a pass of the caller's: its sites are read and replaced as ``run`` says."""
        with self._paused(), self._fused(token_mask), self.taps.during(run):
            logits = self.adapter.run(tokens, token_mask)
        self.taps.check_each_once(run)
        return logits

    def product(self, name: str, x: Tensor, y: Tensor) -> SiteProduct:
        """A site's product, from its input and output as the model passes them."""
        return SiteProduct(name, self.adapter, self.weights, x, y)

    def _output(self, masks: AnyMasks, constant_weights: bool, name: str, x: Tensor, y: Tensor) -> Tensor | None:
        """One site's output under masks."""
        if name not in masks:
            return None
        with self.weights.constant() if constant_weights else nullcontext():
            product = self.product(name, x, y)
            if isinstance(masks, Masks):
                return product.masked(masks[name])
            if not product.plain:
                routed = None if masks.routing is None else masks.routing[name]
                return product.masked(SiteMask(*masks.mask(name), routed))
            return masks.product(name, product.y, product.x, product.V, product.U, product.bias).reshape(y.shape)

    @contextmanager
    def _recomputing(
        self, function: Callable[[str, Tensor, Tensor], Tensor | None], token_mask: Tensor | None
    ) -> Iterator[None]:
        """Layers that keep only their inputs; computed again, they see the masks of the pass they belong to."""

        @contextmanager
        def again() -> Iterator[None]:
            with self._paused(), self._fused(token_mask), self.taps.during(SitePass(function)):
                yield

        def recomputed(block: nn.Module) -> Callable[..., Any]:
            return partial(
                torch.utils.checkpoint.checkpoint,
                block.forward,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=lambda: (nullcontext(), again()),
            )

        blocks = self.adapter.blocks()
        forwards = [block.__dict__.get("forward") for block in blocks]
        for block in blocks:
            block.forward = recomputed(block)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for block, before in zip(blocks, forwards, strict=True):
                if before is None:
                    del block.forward
                else:
                    block.forward = before  # type: ignore[method-assign]

    def _fused(self, token_mask: Tensor | None) -> AbstractContextManager[None]:
        return self.adapter.fused_attention() if self.fused_attention and token_mask is None else nullcontext()

    def _paused(self) -> AbstractContextManager[Any]:
        attached = attached_to(self.model)
        return nullcontext() if attached is None else attached.paused()
