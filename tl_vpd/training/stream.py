"""A batch's part of a training step: sections A to G of ``tl_vpd.training.reference``, with gradients.

A plain run has one stream of batches. A targeted run has two, whose gradients add up (``tl_vpd.training.targeted``). Rows may run
in micro-batches and be split over processes; means over tokens are then weighted by the real tokens of each micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from tl_vpd.losses import Penalty
from tl_vpd.masking import PersistentSources
from tl_vpd.training.adversary import Adversary
from tl_vpd.training.config import VPDConfig
from tl_vpd.training.distributed.processes import World
from tl_vpd.training.engine import CleanForward, EagerEngine
from tl_vpd.training.masked_passes import MaskedPasses, TokenCounts
from tl_vpd.training.micro_batch import MicroBatch, attacked_among_first, split_batch
from tl_vpd.training.minimality import Minimality
from tl_vpd.training.schedules import Schedule
from tl_vpd.training.step_samples import StepSampler

Values = dict[str, Float[Tensor, ""]]
"""Losses by name, and ``l0``."""


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
        self.split = split_batch(world.rows(shape[0]), micro_batch, merged=config.merged)
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

    def backward(
        self,
        tokens: Shaped[Tensor, "batch ..."],
        token_mask: Bool[Tensor, "batch pos"] | None,
        step: int,
        now: Schedule,
    ) -> StreamGradients:
        """Gradients of V, U and Γ on this process's rows, after the adversary's first ascents.

        Args:
            tokens: the rows.
            token_mask: False at padding (None: no padding).
            step: the number of the step.
            now: its schedule.

        Raises:
            ValueError: there are more or fewer rows than the stream was made for, or longer ones, or all is padding.
        """
        sampler, adversary = self._of_length(tokens)
        c, samples, penalty = now.coefficients, sampler.at(step), self.minimality.penalty(now)
        ascents = self.config.adversary.inner_steps if c.adversarial else 0
        counts, n = self._count(tokens, token_mask, sampler.pos)
        if not n:
            raise ValueError(f"Step {step}: every token of the batch is padding: leave out rows that are empty.")
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
            for result in passes.run(clean, step, samples, counts, grad_g):
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

    def _of_length(self, tokens: Tensor) -> tuple[StepSampler, Adversary]:
        """What draws for rows of this length, and the adversary, whose sources of further positions rest."""
        pos = 1 if tokens.is_floating_point() and tokens.ndim == 2 else tokens.shape[1]
        if len(tokens) != len(self.split.rows) or pos > self.pos:
            raise ValueError(
                f"This trainer takes {len(self.split.rows)} rows per step, of at most {self.pos} positions, and this batch has "
                f"{len(tokens)} rows of {pos}."
            )
        shorter = pos < self.pos and self.config.adversary.pool is None
        return self.sampler.of_length(pos), Adversary(self.engine, self.sources, slots=pos if shorter else None)

    def _count(self, tokens: Tensor, token_mask: Tensor | None, pos: int) -> tuple[TokenCounts, int]:
        """Real tokens of the whole batch, on the device, and of all rows as a number."""
        split, first = self.split, self.split.rows[0]
        real = torch.full(tokens.shape[:1], float(pos)) if token_mask is None else token_mask.sum(1).float().cpu()
        kinds = [split.rows, split.attacked, split.stochastic]
        on_cpu = torch.stack([real[[row - first for row in rows]].sum() for rows in kinds])
        counts = self.world.add(on_cpu.to(self.engine.decomposition.device))
        n = int(on_cpu[0] if self.world.size == 1 else counts[0])
        return TokenCounts(*counts.to(self.sampler.dtype).unbind()), n

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
    g = g.flatten(0, -2) if clean.token_mask is None else g[clean.token_mask]
    largest = g.amax(0) if len(g) else g.new_zeros(g.shape[-1])
    return largest if before is None else torch.maximum(before, largest)
