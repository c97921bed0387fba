"""A model run with masks, without HookPoints: for training, evaluation and adversaries.

    >>> with MaskedModel(decomposition, model) as masked_model:     # doctest: +SKIP
    ...     logits, inputs = masked_model.clean(tokens)             # the target itself, and every site's input
    ...     masked = masked_model.masked(tokens, masks)             # the same model with masked subcomponents

Hooks that users left on the model are set aside during these runs (permanent ones stay: they are part of the model) and
the target's weights collect no gradients. Masks are arguments of each call; nothing of a pass is stored after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
import torch.utils.checkpoint
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from tl_vpd.adapters import adapt
from tl_vpd.adapters.changes import Change, Later, enter
from tl_vpd.adapters.taps import put_method
from tl_vpd.components import Components
from tl_vpd.forward.attachments import attached_to
from tl_vpd.forward.cast_weights import CastWeights
from tl_vpd.forward.entry import entry_of
from tl_vpd.forward.site_product import PassMasks, SiteProduct
from tl_vpd.forward.site_taps import SitePass, SiteTaps
from tl_vpd.forward.target_check import check_target
from tl_vpd.importance import DecomposedWeights
from tl_vpd.masking import Masks
from tl_vpd.site import nearest

M = TypeVar("M", bound="MaskedModel")


class MaskedModel:
    """A model whose sites can be masked in any pass. A context manager, which may be nested: leaving it takes the taps off.

    Args:
        weights: V and U are read at every pass, so that training sees its updates (Components will do: they have no Γ).
        model: the target.
        fused_attention: whether attention that nobody hooks may be computed in one call (the same to rounding, not to the bit).
        check_weights: refuse a model with other weights than the decomposed ones.

    Raises:
        ValueError: the model is not the target of the decomposition (``target_check``).
    """

    def __init__(
        self,
        weights: DecomposedWeights | Components,
        model: nn.Module,
        *,
        fused_attention: bool = False,
        check_weights: bool = True,
    ) -> None:
        self.model = model
        self.fused_attention = fused_attention
        self.adapter = adapt(model)
        check_target(weights, self.adapter, check_weights=check_weights)
        self.weights = CastWeights(weights, self.adapter.device, self.adapter.dtype)
        self.names = list(self.weights.sites)
        self.taps = SiteTaps(self.adapter, self.names, self.weights.streams)
        self.entry = entry_of(self.adapter, self.names)
        self._change, self._depth = Change(self.put_on), 0

    def __enter__(self: M) -> M:
        if not self._depth:
            self._change.undo()  # what an interrupted one has left
            self._change.__enter__()
        self._depth += 1
        return self

    def __exit__(self, *exception: Any) -> None:
        self._depth -= 1
        if not self._depth:
            self._change.undo()

    def put_on(self, undo: Later) -> None:
        """Puts the taps on the model.

        Args:
            undo: notes how to remove them.
        """
        enter(undo, self.taps.on())

    def clean(
        self, tokens: Shaped[Tensor, "batch ..."], token_mask: Bool[Tensor, "batch pos"] | None = None
    ) -> tuple[Float[Tensor, "batch ..."], dict[str, Float[Tensor, "batch ..."]]]:
        """The target's logits and every site's input, without gradients."""
        run = SitePass(collect=True)
        with torch.no_grad():
            return self.run(tokens, run, token_mask), run.inputs

    def inputs(
        self, tokens: Shaped[Tensor, "batch ..."], token_mask: Bool[Tensor, "batch pos"] | None = None
    ) -> dict[str, Float[Tensor, "batch ..."]]:
        """Every site's input, as ``clean`` gives it; logits are not computed where the model can stop before them."""
        no_logits = nullcontext() if self.adapter.unembedding() is None else self.adapter.unembedding_left_out()
        with no_logits:
            return self.clean(tokens, token_mask)[1]

    def clean_prompts(
        self, prompts: Any, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, dict[str, Float[Tensor, "batch ..."]]]:
        """Prompts as tokens, which of them are real (None: all), and every site's input on them.

        Raises:
            ValueError: the prompts are empty, too long, or not this model's tokens.
        """
        tokens = self.adapter.tokens(prompts)
        token_mask = self.adapter.padding(tokens, attention_mask)
        return tokens, token_mask, self.inputs(tokens, token_mask)

    def masked(
        self,
        tokens: Shaped[Tensor, "batch ..."],
        masks: Masks | PassMasks,
        token_mask: Bool[Tensor, "batch pos"] | None = None,
        *,
        start: Float[Tensor, "batch pos d_model"] | None = None,
        constant_weights: bool = False,
        checkpoint: bool = False,
    ) -> Float[Tensor, "batch ..."]:
        """Logits under masks.

        Args:
            tokens: ``[batch, pos]``, or the input of a custom model.
            masks: of the sites that are masked, as tensors or made inside each product; the other sites run unmasked.
            token_mask: False at padding (None: no padding).
            start: the residual stream that enters the first decomposed block, from the clean pass (None: every block runs).
            constant_weights: gradients reach the masks but not V and U (an adversary's steps).
            checkpoint: a layer's activations are not stored for backward but computed again in it.

        Raises:
            KeyError: the masks name a site that is not decomposed.
            ValueError: a mask has other axes than ``[C]`` or ``[batch, pos, C]``.
        """
        if isinstance(masks, Masks) and (others := [name for name in masks if name not in self.weights.sites]):
            raise KeyError(
                f"The masks name {others[0]!r}, which is not decomposed{nearest(others[0], self.weights.sites)}."
            )
        function = partial(self._output, masks, constant_weights)
        late = nullcontext() if start is None or self.entry is None else self.entry.at(start)
        with late, self._recomputing(function, token_mask) if checkpoint else nullcontext():
            return self.run(tokens, SitePass(function), token_mask)

    def run(self, tokens: Tensor, run: SitePass, token_mask: Tensor | None = None) -> Tensor:
        """The model's output in a pass whose sites are read and replaced as ``run`` says."""
        reading = self.entry.reading() if run.collect and self.entry is not None else nullcontext(list[Tensor]())
        with self._paused(), self._fused(token_mask), self.taps.during(run), reading as residual:
            logits = self.adapter.run(tokens, token_mask)
        self.taps.check_each_once(run)
        run.residual = next(iter(residual), None)
        return logits

    def can_start_late(self, tokens: Tensor, token_mask: Tensor | None = None) -> bool:
        """Whether passes may start at the first decomposed block: there are blocks before it, and the output is the same."""
        return self.late_start(tokens, token_mask) is not None

    @torch.no_grad()
    def late_start(
        self, tokens: Shaped[Tensor, "batch ..."], token_mask: Bool[Tensor, "batch pos"] | None = None
    ) -> Float[Tensor, "batch pos d_model"] | None:
        """The residual stream from which masked passes may start (None: every block runs)."""
        if self.entry is None:
            return None
        run = SitePass(collect=True)
        whole = self.run(tokens, run, token_mask)
        same = torch.equal(self.masked(tokens, Masks({}), token_mask, start=run.residual), whole)
        return run.residual if same else None

    def product(self, name: str, x: Tensor, y: Tensor) -> SiteProduct:
        """A site's product, from its input and output as the model passes them."""
        return SiteProduct(name, self.adapter, x, y, self.weights.V[name], self.weights.U[name])

    def _output(self, masks: Masks | PassMasks, constant: bool, name: str, x: Tensor, y: Tensor) -> Tensor | None:
        """One site's output under masks."""
        if name not in masks:
            return None
        if isinstance(masks, Masks):
            V, U = self.weights.V, self.weights.U
            matrices = (V.constant(name), U.constant(name)) if constant else (V[name], U[name])
            product = SiteProduct(name, self.adapter, x, y, *matrices)
            mask = masks[name].fitted(name, (*product.rows, product.V.shape[1]), x.device)
            return product.masked(mask, overwrite=True)  # the taps stand before every hook

        def masked(V: Tensor, U: Tensor, x: Tensor, y: Tensor) -> Tensor:
            V, U = (V.detach(), U.detach()) if constant else (V, U)
            return SiteProduct(name, self.adapter, x, y, V.to(x.device), U.to(x.device)).masked_by(masks)

        output: Tensor = self.weights.components.by_site[name](masked, x, y)
        return output

    def _recomputing(
        self, function: Callable[[str, Tensor, Tensor], Tensor | None], token_mask: Tensor | None
    ) -> AbstractContextManager[None]:
        """Layers that store only their inputs; computed again, they see the masks of the pass they belong to."""

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

        def replace(undo: Later) -> None:
            for block in self.adapter.blocks():
                put_method(undo, block, "forward", recomputed(block))

        return Change(replace)

    def _fused(self, token_mask: Tensor | None) -> AbstractContextManager[None]:
        return self.adapter.fused_attention() if self.fused_attention and token_mask is None else nullcontext()

    def _paused(self) -> AbstractContextManager[Any]:
        attached = attached_to(self.model)
        return nullcontext() if attached is None else attached.paused()
