"""The passes of a training step through the model: the clean one with Γ, and masked ones, with their gradients.

    >>> seen = passes.clean(part, tokens, keep, penalty)                              # doctest: +SKIP
    >>> passes.attack(seen, slice(None), taken, total, grad_sources=gradient)         # doctest: +SKIP
    >>> (loss,) = passes.reconstruct(seen, taken, [share], grad_g=grad_g)             # doctest: +SKIP
    >>> passes.into_gamma(seen, grad_g, slope, penalty)                               # doctest: +SKIP

What they do not know: what is drawn, what losses weigh, and what comes after what (``tl_vpd.training.trainer``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_vpd.adapters import Unsupported
from tl_vpd.forward.blocked import BlockedMasks
from tl_vpd.forward.masked_model import MaskedModel
from tl_vpd.importance import DecomposedWeights
from tl_vpd.importance.squash import LOWER_LEAKY, Squash
from tl_vpd.losses import Penalty, Reconstruction, Unembedding, faithfulness_terms
from tl_vpd.masking import PersistentSources
from tl_vpd.training.config import Precision
from tl_vpd.training.micro_batch import MicroBatch, Routing

EVERY = slice(None)
LOGITS = 1 << 27
"""Bytes of a part's logits in float32 above which they are made in blocks, unless asked otherwise."""
SAME = {"float32": 1e-3, "bfloat16": 0.02}
"""How far the model's own logits may be from those of its unembedding alone, as a share of their norm."""


@dataclass(frozen=True)
class CleanForward:
    """A part of the batch after its clean pass.

    ``distance``: from the target's output. ``z``: Γ's pre-sigmoid values, of which each pass makes the importances that it
    needs. ``sums``: of the penalty over tokens, and ``l0``: of importances above 0.
    """

    part: MicroBatch
    tokens: Tensor
    token_mask: Bool[Tensor, "batch pos"] | None
    distance: Reconstruction
    z: Tensor
    sums: Tensor
    l0: Tensor

    @property
    def attacked(self) -> slice:
        """The rows the adversary attacks: the first ones."""
        return slice(0, self.part.attacked.stop - self.part.attacked.start)


@dataclass(frozen=True)
class MaskInputs:
    """What a masked pass takes: sources, which row of them each token takes (None: its own), routing, and sites (None: all).

    ``expected``: the share of tokens at which a site is expected to be routed.
    """

    sources: Float[Tensor, "rows C_and_deltas"]
    rows: Int[Tensor, " tokens"] | None = None
    routing: Routing = None
    sites: tuple[str, ...] | None = None
    expected: float = 1.0


@dataclass(frozen=True)
class LossTerm:
    """A pass's share of one loss: rows of its output, the rows of the target they are compared with, and how it counts.

    ``total``: tokens that the loss is a mean over. ``weight``: of the loss.
    """

    total: Float[Tensor, ""]
    weight: float
    rows: slice = field(default_factory=lambda: EVERY)
    compared: slice = field(default_factory=lambda: EVERY)


class EagerEngine:
    """Runs a tapped decomposition.

    Args:
        kind: of distance between outputs. squash: makes importances from pre-sigmoid values.
        precision: of matrix products. checkpoint: whether a layer's activations are computed again in backward.
        blocked_logits: whether logits are made for a few tokens at a time, in each loss, and never for all of them (None: where
            those of the rows run at once would take more than ``LOGITS`` bytes, and the model lets itself be cut before them).

    Raises:
        ValueError: ``blocked_logits`` with outputs that are no logits.
        Unsupported: ``checkpoint`` with a model that is no stack of layers. The first clean pass does so where
            ``blocked_logits`` is True and this model's logits are not a product alone.
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
            raise TypeError("A Trainer needs a tapped Decomposition: bare Components have no Γ.")
        if checkpoint:
            masked_model.adapter.blocks()
        self.masked_model, self.decomposition = masked_model, decomposition
        self.kind, self.squash = kind, squash
        self.precision, self.checkpoint = precision, checkpoint
        if blocked_logits and kind != "kl":
            raise ValueError("blocked_logits=True goes with output='kl': leave it out where outputs are no logits.")
        self.blocked_logits = blocked_logits
        self.unembedding: Unembedding | None = None
        self._decided = kind != "kl" or blocked_logits is False
        self._work: dict[str, Tensor] = {}

    def workspace(self, what: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor of undefined content that is used again and again: fresh memory costs more than the sums done in it."""
        n, held = math.prod(shape), self._work.get(what)
        if held is None or held.dtype != dtype or held.numel() < n:
            held = self._work[what] = torch.empty(n, dtype=dtype, device=self.decomposition.device)
        return held[:n].view(*shape)

    def faithfulness(
        self, weights: Mapping[str, Float[Tensor, "_ _"]], coefficient: float, *, relative: bool = False
    ) -> Float[Tensor, ""]:
        """The loss; its gradients, times the coefficient, go to V and U. One site at a time, so that one Δ is held at once."""
        value = torch.zeros((), dtype=next(iter(weights.values())).dtype, device=self.decomposition.device)
        with torch.set_grad_enabled(coefficient != 0):
            for term in faithfulness_terms(self.decomposition.components, weights, relative=relative):
                if coefficient:
                    (coefficient * term).backward()
                value += term.detach()
        return value

    def clean(
        self, part: MicroBatch, tokens: Tensor, token_mask: Bool[Tensor, "batch pos"] | None, penalty: Penalty
    ) -> CleanForward:
        """The target's output and Γ's values on a part of the batch."""
        own, kept = part.of(tokens), part.of(token_mask)
        assert own is not None
        self._decide(own, kept)
        with self._autocast():
            with self._cut():
                output, inputs = self.masked_model.clean(own, kept)
            z = self.decomposition.pre_sigmoid(inputs, kept)
        z = z.float() if z.dtype == torch.bfloat16 else z
        sums = penalty.sums(z.detach().flatten(0, -2), None if kept is None else kept.flatten())
        important = torch.linalg.vector_norm(z.detach().clamp(min=0), ord=0, dim=-1)
        l0 = (important if kept is None else important * kept).sum()
        return CleanForward(part, own, kept, self._distance(output, kept), z, sums, l0)

    def attack(
        self,
        seen: CleanForward,
        rows: slice,
        taken: MaskInputs,
        total: Tensor,
        *,
        grad_sources: Float[Tensor, "some C_and_deltas"],
    ) -> None:
        """The adversary's own gradient: that of the rows' share of a mean over ``total`` tokens, V, U and Γ constant."""
        output, run = self._masked(seen, rows, taken, grad_sources=grad_sources)
        loss = weighted(seen.distance.rows(rows), output, total)
        torch.autograd.grad(loss, run.handle, allow_unused=True)

    def reconstruct(
        self,
        seen: CleanForward,
        taken: MaskInputs,
        shares: Sequence[LossTerm],
        *,
        grad_g: Float[Tensor, "batch *pos C_total"],
        grad_sources: Float[Tensor, "some C_and_deltas"] | None = None,
    ) -> list[Float[Tensor, ""]]:
        """The losses of one pass over all rows; the gradients of their weighted sum go to V and U, ``grad_g`` and the sources."""
        output, _ = self._masked(seen, EVERY, taken, grad_g=grad_g, grad_sources=grad_sources)
        losses = [weighted(seen.distance.rows(s.compared), output[s.rows], s.total) for s in shares]
        torch.stack([s.weight * loss for s, loss in zip(shares, losses, strict=True)]).sum().backward()
        return [loss.detach() for loss in losses]

    def into_gamma(
        self,
        seen: CleanForward,
        grad_g: Float[Tensor, "batch *pos C_total"],
        slope: Float[Tensor, " C_total"],
        penalty: Penalty,
    ) -> None:
        """Γ's gradients, from those of the importances (used up) and of the sums that minimality counts."""
        token_mask = None if seen.token_mask is None else seen.token_mask.flatten()
        rows = seen.z.detach().flatten(0, -2)
        penalty.pullback(rows, slope, token_mask, grad_g=grad_g.flatten(0, -2), squash=self.squash)
        seen.z.backward(grad_g)

    def ascend(self, sources: PersistentSources, gradient: Tensor, lr: float, rows: slice, update: int) -> None:
        """Moves some rows of sources along their gradient."""
        sources.ascend(gradient, lr, rows, update=update)

    def _masked(
        self,
        seen: CleanForward,
        rows: slice,
        taken: MaskInputs,
        *,
        grad_g: Float[Tensor, "batch *pos C_total"] | None = None,
        grad_sources: Float[Tensor, "some C_and_deltas"] | None = None,
    ) -> tuple[Float[Tensor, "batch *pos d"], BlockedMasks]:
        """The masked model's output on some rows of a part, and the pass; V and U are constant where ``grad_g`` is None."""
        z = seen.z.detach()[rows]
        run = BlockedMasks(
            z,
            taken.sources,
            self.decomposition.site_axis,
            None if taken.routing is None else {name: at.view(z.shape[:-1]) for name, at in taken.routing.items()},
            taken=taken.rows,
            grad_g=None if grad_g is None else grad_g[rows],
            grad_sources=grad_sources,
            sites=taken.sites,
            squash=self.squash,
        )
        token_mask = None if seen.token_mask is None else seen.token_mask[rows]
        constant = grad_g is None
        with self._autocast(), self._cut():
            output = self.masked_model.masked(
                seen.tokens[rows], run, token_mask, constant_weights=constant, checkpoint=self.checkpoint
            )
        return output, run

    def _distance(self, target: Tensor, token_mask: Tensor | None) -> Reconstruction:
        return Reconstruction(target, self.kind, token_mask, self.unembedding)

    def _cut(self) -> AbstractContextManager[None]:
        """Inside, the model stops before its logits, if these are made in the losses."""
        return nullcontext() if self.unembedding is None else self.masked_model.adapter.unembedding_left_out()

    def _decide(self, tokens: Tensor, token_mask: Tensor | None) -> None:
        """At the first rows: whether logits are made in the losses."""
        if self._decided:
            return
        self._decided = True
        found = self.masked_model.adapter.unembedding()
        size = 0 if found is None else tokens.numel() * found.vocabulary * torch.float32.itemsize
        if not self.blocked_logits and size <= LOGITS:
            return
        if found is not None and self.precision == "bfloat16":
            found = found.to(torch.bfloat16)
        if found is not None and self._is_all(found, tokens[:1], None if token_mask is None else token_mask[:1]):
            self.unembedding = found
        elif self.blocked_logits:
            raise Unsupported(
                "blocked_logits=True needs a model whose logits are unembed's product and nothing else (no soft cap, no scale, "
                "no hook on them): leave blocked_logits out."
            )

    def _is_all(self, found: Unembedding, row: Tensor, token_mask: Tensor | None) -> bool:
        """Whether the model's logits on a row are that product and nothing else."""
        with self._autocast():
            whole = self.masked_model.clean(row, token_mask)[0].float()
            with self.masked_model.adapter.unembedding_left_out():
                x = self.masked_model.clean(row, token_mask)[0]
        if (*x.shape[:-1], found.vocabulary) != whole.shape or x.shape[-1] != found.weight.shape[1]:
            return False
        error = (found.logits(x.flatten(0, -2)) - whole.flatten(0, -2)).norm() / whole.norm()
        return float(error) < SAME[self.precision]

    def _autocast(self) -> torch.autocast:
        lower = self.precision == "bfloat16"
        return torch.autocast(self.decomposition.device.type, dtype=torch.bfloat16, enabled=lower)


def weighted(distance: Reconstruction, output: Tensor, total: Tensor) -> Float[Tensor, ""]:
    """A mean over these rows' real tokens, as their share of the mean over ``total`` tokens."""
    n = output[..., 0].numel() if distance.token_mask is None else distance.token_mask.sum()
    return distance(output) * (n / total.clamp(min=1))
