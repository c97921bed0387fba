"""A masked pass with its losses and all their gradients as one function of tensors, to be recorded and compiled.

    tokens, z, sources → losses;      gradients of the sources are written, those of g, V and U added, into tensors of the caller

Routed tokens have a fixed number of slots (``tl_vpd.forward.slots``): passes with more routed tokens run eagerly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tl_vpd.forward.mask_inputs import MaskInputs
from tl_vpd.forward.slots import Slots, assign_slots
from tl_vpd.forward.traceable import TraceableMasks
from tl_vpd.losses import unembedded_kl
from tl_vpd.losses.precision import at_least_float32
from tl_vpd.masking.masks import mask_of
from tl_vpd.training.engine.eager import EagerEngine
from tl_vpd.training.engine.records import CleanForward, LossTerm

ROOM = 4.0
"""Standard deviations above the expected number of routed tokens for which there are slots: one site in 30,000 needs more."""
Leaf = tuple[str, str]
"""What a gradient is of: ``g``, ``r`` or ``delta``, and the site."""


class PassTensors(NamedTuple):
    """The tensors of a masked pass. Gradients go into ``grad_sources`` and ``grad_g`` (None: they are not computed)."""

    tokens: Tensor
    token_mask: Tensor | None
    residual: Tensor | None
    z: Tensor
    target: Tensor
    target_mask: Tensor | None
    sources: Tensor
    source_rows: Tensor | None
    totals: Tensor
    weights: Tensor
    grad_sources: Tensor | None
    grad_g: Tensor | None


class MaskedGraph:
    """One kind of masked pass: its sites and its losses. The function is ``__call__``, its arguments are ``arguments``.

    Args:
        engine: whose model is run.
        inputs: of the masks; only sites and whether tokens are routed are fixed by it.
        terms: the losses; only rows are fixed by them.
    """

    def __init__(self, engine: EagerEngine, inputs: MaskInputs, terms: Sequence[LossTerm]) -> None:
        self.engine, self.site_axis = engine, engine.decomposition.site_axis
        self.sites = tuple(self.site_axis.names if inputs.sites is None else inputs.sites)
        self.rows = [term.rows for term in terms]
        self.routed = inputs.routing is not None

    @property
    def key(self) -> tuple[object, ...]:
        """What distinguishes the graph from others with arguments of the same shapes."""
        return "masked", self.sites, str(self.rows), self.routed

    def arguments(
        self,
        clean: CleanForward,
        rows: slice,
        inputs: MaskInputs,
        terms: Sequence[LossTerm],
        grad_g: Tensor | None,
        grad_sources: Tensor | None,
    ) -> list[Tensor | None] | None:
        """The arguments of a pass; None if more tokens are routed than there are slots."""
        slots: Slots | tuple[()] = ()
        if inputs.routing is not None:
            routing = torch.stack([inputs.routing[name].reshape(-1) for name in self.sites])
            n = room(inputs.routed_share, routing.shape[1])
            if max(inputs.routing.counts_of(self.sites)) > n:
                return None
            slots = assign_slots(routing, n)
        distance, totals = clean.distance.rows(rows), torch.stack([term.total for term in terms])
        tensors = PassTensors(
            clean.tokens[rows],
            None if clean.token_mask is None else clean.token_mask[rows],
            None if clean.residual is None else clean.residual[rows],
            clean.z.detach()[rows],
            distance.target,
            distance.token_mask,
            inputs.sources,
            inputs.source_rows,
            totals,
            torch.stack([totals.new_full((), term.weight) for term in terms]),
            grad_sources,
            grad_g,
        )
        return [*tensors, *slots, *([] if grad_g is None else gradients_of(self.matrices()))]

    def matrices(self) -> list[Tensor]:
        """V of the sites, then U."""
        V, U = self.engine.decomposition.V, self.engine.decomposition.U
        return [*(V[name] for name in self.sites), *(U[name] for name in self.sites)]

    def __call__(self, *arguments: Tensor | None) -> list[Tensor]:
        """The losses; gradients go into the arguments."""
        n = len(PassTensors._fields)
        tensors, rest = PassTensors._make(arguments[:n]), arguments[n:]  # type: ignore[arg-type]
        slots: dict[str, Slots] | None = None
        if self.routed:
            slots, rest = dict(zip(self.sites, map(Slots, *rest[:3]), strict=True)), rest[3:]  # type: ignore[arg-type]
        leaves = self._leaves(tensors, slots)
        with torch.enable_grad():
            losses = self._losses(tensors, leaves, slots)
            total = (tensors.weights * torch.stack(losses)).sum()
        matrices = [] if tensors.grad_g is None else self.matrices()
        differentiated = [leaf for leaf in leaves.values() if leaf.requires_grad]
        gradients = torch.autograd.grad(total, [*differentiated, *matrices], allow_unused=True, materialize_grads=True)
        names = [what for what, leaf in leaves.items() if leaf.requires_grad]
        by_leaf = dict(zip(names, gradients, strict=False))
        if slots is not None:
            by_leaf = {(kind, name): slots[name].gradient(grad) for (kind, name), grad in by_leaf.items()}
        self._write_sources(tensors, by_leaf)
        self._add_to_g(tensors, by_leaf)
        for stored, gradient in zip(rest, gradients[len(names) :], strict=True):
            assert stored is not None
            stored += gradient
        return [loss.detach() for loss in losses]

    def _leaves(self, tensors: PassTensors, slots: Mapping[str, Slots] | None) -> dict[Leaf, Tensor]:
        """Importances, sources and Δ's sources by site, of tokens or of slots."""
        z = tensors.z.flatten(0, -2)
        sources = tensors.sources if tensors.source_rows is None else tensors.sources[tensors.source_rows]
        leaves: dict[Leaf, Tensor] = {}
        for name in self.sites:
            at, delta = self.site_axis.slices[name], self.site_axis.total + self.site_axis.names.index(name)
            token = slice(None) if slots is None else slots[name].token
            leaves["g", name] = self.engine.squash.importances(z[:, at][token])
            leaves["r", name] = sources[:, at][token].detach()
            leaves["delta", name] = sources[:, delta : delta + 1][token].detach()
        for (kind, _), leaf in leaves.items():
            leaf.requires_grad_((tensors.grad_g if kind == "g" else tensors.grad_sources) is not None)
        return leaves

    def _losses(
        self, tensors: PassTensors, leaves: Mapping[Leaf, Tensor], slots: Mapping[str, Slots] | None
    ) -> list[Tensor]:
        engine = self.engine
        masks = TraceableMasks(
            {name: mask_of(leaves["g", name], leaves["r", name]) for name in self.sites},
            {name: leaves["delta", name] for name in self.sites},
            tensors.z.shape[:-1],
            slots,
        )
        with engine.autocast(), engine.without_logits():
            output = engine.masked_model.masked(
                tensors.tokens,
                masks,
                tensors.token_mask,
                start=tensors.residual,
                constant_weights=tensors.grad_g is None,
            )
        losses = []
        for rows, total in zip(self.rows, tensors.totals.unbind(), strict=True):
            real = None if tensors.target_mask is None else tensors.target_mask[rows]
            losses.append(self._summed(tensors.target[rows], output[rows], real) / total.clamp(min=1))
        return losses

    def _summed(self, target: Tensor, output: Tensor, token_mask: Tensor | None) -> Float[Tensor, ""]:
        """The distance summed over real tokens, as plain operations."""
        if self.engine.unembedding is not None:
            n = output[..., 0].numel() if token_mask is None else token_mask.sum()
            return unembedded_kl(target, output, self.engine.unembedding, token_mask) * n
        if self.engine.kind == "kl":
            distances = (target.exp() * (target - at_least_float32(output).log_softmax(-1))).sum(-1)
        else:
            distances = (at_least_float32(output) - target).square().mean(-1)
        return (distances if token_mask is None else distances * token_mask).sum()

    def _write_sources(self, tensors: PassTensors, gradients: Mapping[Leaf, Tensor]) -> None:
        """The gradients of sources and Δ's sources, concatenated as sources are; added up where tokens use the same row."""
        target, source_rows = tensors.grad_sources, tensors.source_rows
        if target is None:
            return
        n = tensors.z.flatten(0, -2).shape[0]
        blocks = [
            gradients[kind, name] if name in self.sites else target.new_zeros(n, C if kind == "r" else 1)
            for kind in ("r", "delta")
            for name, C in self.site_axis.counts.items()
        ]
        rows = torch.cat(blocks, dim=1)
        if source_rows is not None:
            rows = torch.zeros_like(tensors.sources).index_add(0, source_rows, rows)
        target.copy_(rows[: len(target)])

    def _add_to_g(self, tensors: PassTensors, gradients: Mapping[Leaf, Tensor]) -> None:
        target = tensors.grad_g
        if target is None:
            return
        rows = target.flatten(0, -2)
        blocks = [
            rows[:, at] + gradients["g", name] if name in self.sites else rows[:, at]
            for name, at in self.site_axis.slices.items()
        ]
        target.copy_(torch.cat(blocks, dim=1).view_as(target))


def gradients_of(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Where the gradients of parameters are accumulated; zeros where there are none yet."""
    gradients = []
    for matrix in matrices:
        matrix.grad = torch.zeros_like(matrix) if matrix.grad is None else matrix.grad
        gradients.append(matrix.grad)
    return gradients


def room(share: float, tokens: int) -> int:
    """Slots for a share of tokens that is expected to be routed, each token independently: a multiple of 8, or all.

    >>> room(0.5, 512), room(0.5, 16), room(1.0, 512)
    (304, 16, 512)
    """
    n = share * tokens + ROOM * math.sqrt(share * (1 - share) * tokens)
    return min(tokens, 8 * math.ceil(n / 8))
