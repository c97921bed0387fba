"""The passes of a training step through the model, with their gradients: the clean one with Γ, and masked ones.

    >>> clean = engine.clean(micro_batch, tokens, token_mask, penalty)                        # doctest: +SKIP
    >>> engine.attack(clean, inputs, total, grad_sources=gradient)                            # doctest: +SKIP
    >>> (loss,) = engine.reconstruct(clean, inputs, [term], grad_g=grad_g)                    # doctest: +SKIP
    >>> engine.backward_into_gamma(clean, grad_g, grad_sums, penalty)                         # doctest: +SKIP

The trainer decides which random numbers and weights there are, and in which order passes run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_vpd.forward.blocked import BlockedMasks
from tl_vpd.forward.mask_inputs import MaskInputs
from tl_vpd.forward.masked_model import MaskedModel
from tl_vpd.forward.site_taps import SitePass
from tl_vpd.importance import DecomposedWeights
from tl_vpd.importance.squash import LOWER_LEAKY, Squash
from tl_vpd.losses import Penalty, Reconstruction, Unembedding, faithfulness_terms, locality_terms
from tl_vpd.losses.precision import at_least_float32
from tl_vpd.masking import PersistentSources
from tl_vpd.masking.persistent import Rows
from tl_vpd.training.config import Precision
from tl_vpd.training.engine.left_out_logits import unembedding_for_losses
from tl_vpd.training.engine.records import ALL, CleanForward, LossTerm
from tl_vpd.training.micro_batch import MicroBatch


class EagerEngine:
    """Runs passes operation by operation.

    Args:
        masked_model: entered, of a decomposition and its target.
        kind: of the distance between outputs.
        squash: makes importances from pre-sigmoid values.
        precision: of matrix products.
        checkpoint: whether a layer's activations are computed again in backward.
        blocked_logits: whether logits are computed for a few tokens at a time, in each loss (None: where they are large, see
            ``left_out_logits``).

    Raises:
        TypeError: the masked model has bare ``Components``.
        ValueError: ``blocked_logits`` with outputs that are not logits.
        Unsupported: ``checkpoint`` with a model that is not a stack of layers. The first clean pass raises it where
            ``blocked_logits`` is True and the model's logits are not one product.
    """

    def __init__(
        self,
        masked_model: MaskedModel,
        kind: Literal["kl", "mse"] = "kl",
        squash: Squash = LOWER_LEAKY,
        *,
        precision: Precision = "float32",
        checkpoint: bool = False,
        blocked_logits: bool | None = None,
    ) -> None:
        decomposition = masked_model.weights.weights
        if not isinstance(decomposition, DecomposedWeights):
            raise TypeError("Training needs a MaskedModel of a Decomposition: bare Components have no Γ.")
        if checkpoint:
            masked_model.adapter.blocks()
        if blocked_logits and kind != "kl":
            raise ValueError("blocked_logits=True goes with output='kl': leave it out where outputs are not logits.")
        self.masked_model, self.decomposition = masked_model, decomposition
        self.kind, self.squash = kind, squash
        self.precision, self.checkpoint, self.blocked_logits = precision, checkpoint, blocked_logits
        self.unembedding: Unembedding | None = None
        """Computes logits inside losses (None: the model does); known after the first clean pass."""
        self._logits_chosen = kind != "kl" or blocked_logits is False
        self.starts_late: bool | None = None
        """Whether masked passes start at the first decomposed block (None: not known before the first clean pass)."""

    # -- the passes ------------------------------------------------------------------------------------------------

    def faithfulness(
        self, weights: Mapping[str, Float[Tensor, "_ _"]], coefficient: float, *, relative: bool = False
    ) -> Float[Tensor, ""]:
        """The loss; its gradients, times the coefficient, go to V and U. One site at a time: one Δ exists at once.

        Args:
            weights: of the target by site.
            coefficient: of the gradients (0: none are computed).
            relative: the kind of faithfulness.
        """
        components = self.decomposition.components
        value = torch.zeros((), dtype=next(components.parameters()).dtype, device=self.decomposition.device)
        with torch.set_grad_enabled(coefficient != 0):
            for term in faithfulness_terms(components, weights, relative=relative):
                if coefficient:
                    (coefficient * term).backward()
                value += term.detach()
        return value

    def locality(self, width: float, coefficient: float) -> Float[Tensor, ""]:
        """The loss; its gradients, times the coefficient, go to U.

        Args:
            width: t.
            coefficient: of the gradients.
        """
        value = torch.zeros(
            (), dtype=next(self.decomposition.components.parameters()).dtype, device=self.decomposition.device
        )
        for term in locality_terms(self.decomposition.components, width):
            (coefficient * term).backward()
            value += term.detach()
        return value

    def clean(
        self,
        micro_batch: MicroBatch,
        tokens: Tensor,
        token_mask: Bool[Tensor, "batch pos"] | None,
        penalty: Penalty,
    ) -> CleanForward:
        """The target's output and Γ's values on a micro-batch.

        Args:
            micro_batch: which rows.
            tokens: of all of the process's rows.
            token_mask: of all of them, False at padding.
            penalty: whose sums are computed.
        """
        rows, mask = self._select(micro_batch, tokens, token_mask)
        with self.autocast():
            run = SitePass(collect=self.decomposition.gamma_inputs)
            with self.without_logits(), torch.no_grad():
                output = self.masked_model.run(rows, run, mask)
            z = at_least_float32(self.decomposition.pre_sigmoid(run.inputs, mask))
        sums = penalty.sums(z.detach().flatten(0, -2), None if mask is None else mask.flatten())
        important = torch.linalg.vector_norm(z.detach().clamp(min=0), ord=0, dim=-1)
        l0 = (important if mask is None else important * mask).sum()
        residual = run.residual if self.starts_late else None
        return CleanForward(micro_batch, rows, mask, self._distance(output, mask), z, sums, l0, residual)

    def attack(
        self,
        clean: CleanForward,
        inputs: MaskInputs,
        total: Float[Tensor, ""],
        *,
        grad_sources: Float[Tensor, "rows C_and_deltas"],
    ) -> None:
        """The gradient of the adversarial loss in the sources of the attacked rows; V, U and Γ are constant.

        Args:
            clean: the micro-batch.
            inputs: of the attacked rows.
            total: real tokens that the loss is a mean over.
            grad_sources: where the gradient goes; zero before.
        """
        self._losses(clean, clean.attacked, inputs, [LossTerm(total, 1.0)], grad_sources=grad_sources)

    def reconstruct(
        self,
        clean: CleanForward,
        inputs: MaskInputs,
        terms: Sequence[LossTerm],
        *,
        grad_g: Float[Tensor, "batch *pos C_total"],
        grad_sources: Float[Tensor, "first C_and_deltas"] | None = None,
    ) -> list[Float[Tensor, ""]]:
        """The losses of one masked pass over all rows of a micro-batch.

        The gradients of their weighted sum go to V, U, ``grad_g`` and ``grad_sources``.

        Args:
            clean: the micro-batch.
            inputs: of the masks.
            terms: the losses.
            grad_g: where the gradient of the importances is added.
            grad_sources: where that of the sources, or of the first of them, goes; zero before (None: it is not computed).
        """
        return self._losses(clean, ALL, inputs, terms, grad_g=grad_g, grad_sources=grad_sources)

    def backward_into_gamma(
        self,
        clean: CleanForward,
        grad_g: Float[Tensor, "batch *pos C_total"],
        grad_sums: Float[Tensor, " C_total"],
        penalty: Penalty,
    ) -> None:
        """Γ's gradients, from those of the importances and of the sums ``s_c``.

        Args:
            clean: the micro-batch.
            grad_g: gradient of the importances; overwritten.
            grad_sums: gradient of the sums.
            penalty: that was summed.
        """
        token_mask = None if clean.token_mask is None else clean.token_mask.flatten()
        z = clean.z.detach().flatten(0, -2)
        penalty.pullback(z, grad_sums, token_mask, grad_g=grad_g.flatten(0, -2), squash=self.squash)
        clean.z.backward(grad_g)

    def ascend(self, sources: PersistentSources, gradient: Tensor, lr: float, rows: Rows, update: int) -> None:
        """Moves rows of sources along their gradient."""
        sources.ascend(gradient, lr, rows, update=update)

    # -- inside them -----------------------------------------------------------------------------------------------

    def _select(
        self, micro_batch: MicroBatch, tokens: Tensor, token_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """A micro-batch's tokens and mask; at the first one, decides where logits are computed and masked passes start."""
        rows, mask = micro_batch.select(tokens), micro_batch.select(token_mask)
        assert rows is not None
        if not self._logits_chosen:
            self._logits_chosen = True
            with self.autocast():
                self.unembedding = unembedding_for_losses(
                    self.masked_model, rows, mask, blocked_logits=self.blocked_logits, precision=self.precision
                )
        if self.starts_late is None:
            with self.autocast(), self.without_logits():
                self.starts_late = self.masked_model.can_start_late(rows, mask)
        return rows, mask

    def _losses(
        self,
        clean: CleanForward,
        rows: slice,
        inputs: MaskInputs,
        terms: Sequence[LossTerm],
        *,
        grad_g: Tensor | None = None,
        grad_sources: Tensor | None = None,
    ) -> list[Float[Tensor, ""]]:
        """The losses of a masked pass over rows of a micro-batch, and their gradients.

        V and U are constant where ``grad_g`` is None.
        """
        masks = BlockedMasks(
            clean.z[rows],
            inputs,
            self.decomposition.site_axis,
            grad_g=None if grad_g is None else grad_g[rows],
            grad_sources=grad_sources,
            squash=self.squash,
        )
        distance, constant = clean.distance.rows(rows), grad_g is None
        with self.autocast(), self.without_logits():
            output = self.masked_model.masked(
                clean.tokens[rows],
                masks,
                distance.token_mask,
                start=None if clean.residual is None else clean.residual[rows],
                constant_weights=constant,
                checkpoint=self.checkpoint,
            )
        losses = [weighted(distance.rows(term.rows), output[term.rows], term.total) for term in terms]
        torch.stack([term.weight * loss for term, loss in zip(terms, losses, strict=True)]).sum().backward()
        return [loss.detach() for loss in losses]

    def _distance(self, target: Tensor, token_mask: Tensor | None) -> Reconstruction:
        return Reconstruction(target, self.kind, token_mask, self.unembedding)

    def without_logits(self) -> AbstractContextManager[None]:
        """Inside, the model stops before its logits, if losses compute them."""
        return nullcontext() if self.unembedding is None else self.masked_model.adapter.unembedding_left_out()

    def autocast(self) -> torch.autocast:
        """Inside, products have the run's precision.

        Nothing is cached: autocast would keep its copies of weights until the outermost context ends, which is after the run,
        while the weights move in every step.
        """
        low = self.precision == "bfloat16"
        return torch.autocast(self.decomposition.device.type, dtype=torch.bfloat16, enabled=low, cache_enabled=False)


def weighted(distance: Reconstruction, output: Tensor, total: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """A mean over these rows' real tokens, as their part of the mean over ``total`` tokens."""
    n = output[..., 0].numel() if distance.token_mask is None else distance.token_mask.sum()
    return distance(output) * (n / total.clamp(min=1))
