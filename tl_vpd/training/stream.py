"""A batch's part of a training step: sections A to G of ``tl_vpd.training.reference``, with gradients.

A plain run has one stream of batches. A targeted run has two, whose gradients add up (``tl_vpd.training.targeted``). Rows may run
in micro-batches and be split over processes; means over tokens are then weighted by the real tokens of each micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from tl_vpd.losses import Penalty
from tl_vpd.masking import PersistentSources
from tl_vpd.masking.routing import count
from tl_vpd.training.adversary import Adversary
from tl_vpd.training.config import VPDConfig
from tl_vpd.training.distributed.processes import World
from tl_vpd.training.engine import CleanForward, EagerEngine
from tl_vpd.training.masked_passes import MaskedPasses, TokenCounts
from tl_vpd.training.micro_batch import MicroBatch, attacked_among_first, split_batch
from tl_vpd.training.minimality import Minimality
from tl_vpd.training.schedules import Schedule
from tl_vpd.training.step_samples import StepSampler, StepSamples

Values = dict[str, Float[Tensor, ""]]
"""Losses by name, and ``l0``."""


@dataclass(frozen=True)
class StreamBatch:
    """A step's rows of a stream and its random choices.

    Attributes:
        step: its number.
        tokens: the rows.
        token_mask: False at padding (None: no padding).
        sampler: draws for rows of this length.
        samples: what it has drawn.
        counts: real tokens.
    """

    step: int
    tokens: Shaped[Tensor, "batch ..."]
    token_mask: Bool[Tensor, "batch pos"] | None
    sampler: StepSampler
    samples: StepSamples
    counts: TokenCounts


def count_tokens(batches: Sequence[StreamBatch]) -> list[int]:
    """The real tokens of each batch. Waits for the device once at most: it counts routed tokens as well, for all passes."""
    drawn = [(b.samples.stochastic_routing, b.samples.adversarial_routing) for b in batches]
    unknown = [b.counts.all.reshape(1) for b in batches if b.counts.known is None]
    counted = iter(count([routing for both in drawn for routing in both if routing is not None], unknown))
    return [int(next(counted)[0]) if b.counts.known is None else b.counts.known for b in batches]


@dataclass(frozen=True)
class StreamGradients:
    """What a stream's passes gave, besides the gradients of V, U and Γ.

    Attributes:
        values: losses over all processes, and ``l0``.
        sources: the gradients of the adversary's sources, by micro-batch.
        adversary: whose sources these are.
        update: the number of the ascent that these gradients are for.
        largest: every subcomponent's largest importance at a real token of this process's rows (None: not asked for).
    """

    values: Values
    sources: list[tuple[MicroBatch, Tensor]]
    adversary: Adversary
    update: int
    largest: Float[Tensor, " C_total"] | None

    def ascend(self, now: Schedule) -> None:
        """I. The adversary's last ascent. The gradient is that of c · L_adv, from before the update."""
        for micro_batch, gradient in self.sources:
            gradient = gradient.div_(now.coefficients.adversarial)
            self.adversary.ascend(micro_batch, gradient, now.adversary_lr, self.update)


class Stream:
    """The passes of each step over one stream of batches.

    Args:
        config: of the run.
        engine: runs the passes.
        shape: rows of every batch, over all processes, and positions that a row has at most.
        world: the processes that split the batch.
        micro_batch: rows that run at once (None: all).

    Raises:
        ValueError: the batch cannot be split.
    """

    passes: type[MaskedPasses] = MaskedPasses
    sampler_kind: type[StepSampler] = StepSampler
    notes_largest = False
    """Whether every subcomponent's largest importance is noted."""

    def __init__(
        self, config: VPDConfig, engine: EagerEngine, shape: tuple[int, int], world: World, micro_batch: int | None
    ) -> None:
        self.config, self.engine, self.world, self.pos = config, engine, world, shape[1]
        device = engine.decomposition.device
        self.split = split_batch(world.rows(shape[0]), micro_batch, merged=config.merged, device=device)
        if len(self.split.attacked) * world.size != attacked_among_first(shape[0], config.merged or 1.0):
            raise ValueError(
                f"merged={config.merged} would give {world.size} processes different numbers of attacked rows: make that "
                f"proportion of batch_size / processes, {shape[0] // world.size}, an integer."
            )
        site_axis, first = engine.decomposition.site_axis, next(engine.decomposition.components.parameters())
        self.sampler = self.sampler_kind(
            config, self.split, pos=self.pos, site_axis=site_axis, device=first.device, dtype=first.dtype
        )
        adversary = config.adversary
        self.sources = PersistentSources(self.sampler.start(), betas=adversary.betas, eps=adversary.eps)
        self.minimality = Minimality(config, site_axis.total, first)
        kinds = [[float(row in rows) for row in self.split.rows] for rows in self._kinds]
        self.is_of_kind = torch.tensor(kinds, device=device)
        """Whether a row is one of all, attacked, or of those with stochastic masks."""

    def batch(
        self, tokens: Shaped[Tensor, "batch ..."], token_mask: Bool[Tensor, "batch pos"] | None, step: int
    ) -> StreamBatch:
        """A step's batch and random choices. Nothing waits for the device.

        Args:
            tokens: the rows.
            token_mask: False at padding (None: no padding).
            step: the number of the step.

        Raises:
            ValueError: there are more or fewer rows than the stream was made for, or longer ones.
        """
        pos = 1 if tokens.is_floating_point() and tokens.ndim == 2 else tokens.shape[1]
        if len(tokens) != len(self.split.rows) or pos > self.pos:
            raise ValueError(
                f"This trainer takes {len(self.split.rows)} rows per step, of at most {self.pos} positions, and this batch has "
                f"{len(tokens)} rows of {pos}."
            )
        sampler = self.sampler.of_length(pos)
        return StreamBatch(step, tokens, token_mask, sampler, sampler.at(step), self._counts(token_mask, pos))

    def backward(self, batch: StreamBatch, n: int, now: Schedule) -> StreamGradients:
        """Gradients of V, U and Γ on this process's rows, after the adversary's first ascents.

        Args:
            batch: what the step is made on.
            n: its real tokens over all processes.
            now: the schedule of the step.

        Raises:
            ValueError: all is padding.
        """
        tokens, token_mask, samples, counts = batch.tokens, batch.token_mask, batch.samples, batch.counts
        sampler, adversary = batch.sampler, self._adversary(batch.sampler.pos)
        c, penalty = now.coefficients, self.minimality.penalty(now)
        ascents = self.config.adversary.inner_steps if c.adversarial else 0
        if not n:
            raise ValueError(f"Step {batch.step}: every token of the batch is padding: leave out rows that are empty.")
        passes = self.passes(c, self.engine, adversary, sampler, merged=bool(self.config.merged))

        # A, B. Clean forward and importances: of all micro-batches, since minimality needs sums over the whole batch.
        sums, l0, clean = self._sums(tokens, token_mask, penalty)
        # E. Minimality.
        values, grad_sums = self.minimality.losses(self.world.add(sums), n, now)
        values["l0"] = self.world.add(l0) / max(n, 1)
        reconstruction = {name: sums.new_zeros(()) for name in self.passes.losses}
        ascended, grad_sources, largest = self.sources.updates, list[tuple[MicroBatch, Tensor]](), None
        for micro_batch in self.split.micro_batches:
            clean = clean or self.engine.clean(micro_batch, tokens, token_mask, penalty)
            if self.notes_largest:
                largest = _largest(clean, largest)
            # C. The adversary's first ascents.
            for k in range(ascents):
                adversary.ascend_alone(clean, samples, counts.attacked, now.adversary_lr, ascended + k + 1)
            # F, G. Stochastic and adversarial reconstruction.
            grad_g = torch.zeros_like(clean.z)
            for result in passes.run(clean, batch.step, samples, counts, grad_g):
                for name, loss in result.losses.items():
                    reconstruction[name] += loss
                if result.grad_sources is not None:
                    grad_sources.append((micro_batch, result.grad_sources))
            # H. Γ's gradients, from those of the importances in all passes.
            self.engine.backward_into_gamma(clean, grad_g, grad_sums, penalty)
            del grad_g
            clean = None
        added = self.world.add(torch.stack(list(reconstruction.values()))).unbind()
        values |= dict(zip(reconstruction, added, strict=True))
        return StreamGradients(values, grad_sources, adversary, ascended + ascents + 1, largest)

    def _adversary(self, pos: int) -> Adversary:
        """The adversary on rows of this length; its sources of further positions rest."""
        shorter = pos < self.pos and self.config.adversary.pool is None
        return Adversary(self.engine, self.sources, slots=pos if shorter else None)

    @property
    def _kinds(self) -> list[Sequence[int]]:
        return [self.split.rows, self.split.attacked, self.split.stochastic]

    def _counts(self, token_mask: Tensor | None, pos: int) -> TokenCounts:
        """Real tokens of the whole batch."""
        dtype, device = self.sampler.dtype, self.engine.decomposition.device
        if token_mask is None and self.world.size == 1:
            numbers = [len(rows) * pos for rows in self._kinds]
            every, attacked, stochastic = (torch.full((), float(n), dtype=dtype, device=device) for n in numbers)
            return TokenCounts(every, attacked, stochastic, numbers[0])
        real = self.is_of_kind if token_mask is None else self.is_of_kind * token_mask.sum(1)
        counts = self.world.add(real.sum(1) * (pos if token_mask is None else 1))
        every, attacked, stochastic = counts.to(dtype).unbind()
        return TokenCounts(every, attacked, stochastic)

    def _sums(
        self, tokens: Tensor, token_mask: Tensor | None, penalty: Penalty
    ) -> tuple[Float[Tensor, " C_total"], Float[Tensor, ""], CleanForward | None]:
        """``s_c`` and L0 summed over this process's rows; with one micro-batch, its clean forward too."""
        if len(self.split.micro_batches) == 1:
            clean = self.engine.clean(self.split.micro_batches[0], tokens, token_mask, penalty)
            return clean.sums.detach().clone(), clean.l0.clone(), clean
        sums = l0 = torch.zeros((), device=self.engine.decomposition.device)
        for micro_batch in self.split.micro_batches:
            with torch.no_grad():
                clean = self.engine.clean(micro_batch, tokens, token_mask, penalty)
            sums, l0 = sums + clean.sums, l0 + clean.l0
        return sums, l0, None


def _largest(clean: CleanForward, before: Tensor | None) -> Float[Tensor, " C_total"]:
    """Every subcomponent's largest importance at a micro-batch's real tokens, and at those of earlier ones."""
    g = clean.z.detach().clamp(0, 1)
    g = g if clean.token_mask is None else g.masked_fill(~clean.token_mask.unsqueeze(-1), 0)
    largest = g.flatten(0, -2).amax(0)
    return largest if before is None else torch.maximum(before, largest)
