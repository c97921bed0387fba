"""One training step of VPD, and what lives from step to step.

``Trainer.step`` goes through the sections of ``tl_vpd.training.reference``, the whole method on one page: A clean forward, B
importances, C the adversary's first ascents, D faithfulness, E minimality, F stochastic and G adversarial reconstruction, H one
update of V, U and Γ, I the adversary's last ascent. Unlike there, rows may run in micro-batches and be split over processes
(``tl_vpd.training.distributed``); means over tokens are then weighted by the real tokens of each micro-batch.

    >>> trainer = Trainer(masked_model, config, shape=(32, 64))        # doctest: +SKIP
    >>> trainer.step(tokens)                                          # doctest: +SKIP
    StepMetrics(...)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from tqdm.auto import tqdm

from tl_vpd.checks import choice
from tl_vpd.forward.masked_model import MaskedModel
from tl_vpd.losses import Penalty, check_relative, check_units
from tl_vpd.masking import PersistentSources
from tl_vpd.training.adversary import Adversary
from tl_vpd.training.config import ExecutionConfig, VPDConfig
from tl_vpd.training.distributed.processes import World
from tl_vpd.training.distributed.sharding import after_update, clip_gradients, is_sharded
from tl_vpd.training.engine import CleanForward, CompiledEngine, EagerEngine
from tl_vpd.training.masked_passes import MaskedPasses, TokenCounts
from tl_vpd.training.micro_batch import MicroBatch, attacked_among_first, split_batch
from tl_vpd.training.minimality import Minimality
from tl_vpd.training.optimizers import optimizers_of
from tl_vpd.training.schedules import Schedule
from tl_vpd.training.step_samples import StepSampler
from tl_vpd.training.ties import Ties

RECONSTRUCTION = ("stochastic", "adversarial", "layerwise")
Values = dict[str, Float[Tensor, ""]]
"""Losses by name, and ``l0``."""


@dataclass(frozen=True)
class StepMetrics:
    """What a step measured, before its update. Reconstructions in nats (or squared error), ``l0`` per token."""

    step: int
    total: float
    faithfulness: float
    stochastic: float
    adversarial: float
    importance: float
    frequency: float
    l0: float
    p: float
    lr: float
    grad_norm: float
    layerwise: float = 0.0
    locality: float = 0.0


class Trainer:
    """V, U and Γ of a decomposition under training, with their optimizers, the adversary and the random state.

    Args:
        masked_model: an entered ``MaskedModel`` of the decomposition, sharded or not, and its target.
        config: what is learned.
        shape: (batch, pos) of every batch, over all processes; pos is 1 for inputs ``[batch, d]``.
        execution: how it runs (None: ``ExecutionConfig()``).
        world: the processes that split the batch (None: one).

    Raises:
        ValueError: the batch cannot be split, tied sites or Muon's matrices are sharded, V, U and Γ are in less than float32, a
            weight to which faithfulness is relative is zero, or locality has no site that writes to heads or neurons.
        RuntimeError: this PyTorch has no Muon.
        Unsupported: ``checkpoint`` with a model that is not a stack of layers, ``blocked_logits`` with one whose logits are more
            than a product (raised by the first step), or ``compile`` with one in another dtype than V and U.
    """

    def __init__(
        self,
        masked_model: MaskedModel,
        config: VPDConfig,
        shape: tuple[int, int],
        *,
        execution: ExecutionConfig | None = None,
        world: World | None = None,
    ) -> None:
        self.masked_model, self.config, self.world = masked_model, config, world or World()
        self.execution = execution or ExecutionConfig()
        self.engine = _engine(masked_model, config, self.execution)
        self.decomposition = self.engine.decomposition
        self.weights = {name: masked_model.adapter.weight(name) for name in self.decomposition.sites}
        if config.faithfulness.kind == "relative":
            check_relative(self.weights)
        if config.coefficients.locality:
            check_units(self.decomposition.components)
        self.how = {
            **self.execution.model_dump(include={"compile", "micro_batch", "blocked_logits"}),
            "processes": self.world.size,
            "sharded": is_sharded(self.decomposition),
        }
        """What changes results to rounding only."""

        self.sharded = is_sharded(self.decomposition)
        if config.tied and self.execution.sharding != "none":
            raise ValueError(f"Tied sites cannot be sharded: sharding={self.execution.sharding!r} needs tied=().")
        if config.optimizer.kind == "muon" and self.sharded:
            raise ValueError(
                f"Muon needs whole matrices: sharding={self.execution.sharding!r} goes with optimizer.kind='adamw', and "
                "sharding='none' with both."
            )
        self.ties = Ties(self.decomposition.components, config.tied)
        self.matrices = self.ties.free(self.decomposition.components.matrices())
        self.gamma_parameters = list(self.decomposition.gamma.parameters())
        self.parameters = [*self.matrices, *self.gamma_parameters]
        self.optimizers = optimizers_of(config.optimizer, self.matrices, self.decomposition.gamma)

        self.pos, first = shape[1], self.matrices[0]
        self.split = split_batch(self.world.rows(shape[0]), self.execution.micro_batch, merged=config.merged)
        if len(self.split.attacked) * self.world.size != attacked_among_first(shape[0], config.merged or 1.0):
            raise ValueError(
                f"merged={config.merged} would give {self.world.size} processes different numbers of attacked rows: make that "
                f"proportion of batch_size / processes, {shape[0] // self.world.size}, an integer."
            )
        site_axis = self.decomposition.site_axis
        self.sampler = StepSampler(
            config, self.split, pos=self.pos, site_axis=site_axis, device=first.device, dtype=first.dtype
        )
        adversary = config.adversary
        self.sources = PersistentSources(self.sampler.start(), betas=adversary.betas, eps=adversary.eps)
        self.adversary = Adversary(self.engine, self.sources)
        self.minimality = Minimality(config, site_axis.total, first)
        self.done = 0

    def warm_up(self, *, progress: bool = False) -> float:
        """Faithfulness alone, on V and U, with a separate AdamW; returns the last loss.

        Args:
            progress: show a bar.
        """
        faithfulness = self.config.faithfulness
        optimizer = torch.optim.AdamW(self.matrices, lr=faithfulness.warm_up_lr, weight_decay=0.0, fused=True)
        steps = faithfulness.warm_up_steps
        if "warm_up_steps" not in faithfulness.model_fields_set:
            steps = min(steps, self.config.steps)
        for _ in tqdm(range(steps), disable=not progress, desc="faithfulness warm-up", unit="step", leave=False):
            optimizer.zero_grad(set_to_none=True)
            self._faithfulness(1 / self.world.size)
            self._add_gradients(self.matrices)
            optimizer.step()
            self.after_update()
        optimizer.zero_grad(set_to_none=True)
        return float(self._faithfulness(0.0))

    def step(
        self, tokens: Shaped[Tensor, "batch ..."], token_mask: Bool[Tensor, "batch pos"] | None = None
    ) -> StepMetrics:
        """One update of V, U, Γ and the adversary on this process's rows.

        Args:
            tokens: ``[batch, pos]``; custom models may take vectors, ``[batch, pos, d]`` or ``[batch, d]``.
            token_mask: False at padding (None: no padding).

        Raises:
            ValueError: there are more or fewer rows than the trainer was made for, or all is padding.
            FloatingPointError: a loss or gradient is not finite (V, U and Γ have not been updated then, the adversary may have
                been).
        """
        if len(tokens) != len(self.split.rows):
            raise ValueError(
                f"This trainer takes {len(self.split.rows)} rows per step, and this batch has {len(tokens)}."
            )
        now, samples = Schedule.at(self.done, self.config), self.sampler.at(self.done)
        c = now.coefficients
        penalty, ascents = self.minimality.penalty(now), self.config.adversary.inner_steps if c.adversarial else 0
        counts, n = self._count(tokens, token_mask)
        if not n:
            raise ValueError(f"Step {self.done}: every token of the batch is padding: leave out rows that are empty.")
        merged = bool(self.config.merged)
        passes = MaskedPasses(c, self.engine, self.adversary, self.sampler, merged=merged)
        # Everything, also followers of tied sites and what a refused step has left.
        self.decomposition.zero_grad(set_to_none=True)

        # A, B. Clean forward and importances: of all micro-batches, since minimality needs sums over the whole batch.
        sums, l0, clean = self._sums(tokens, token_mask, penalty)
        # D. Faithfulness, and locality.
        values: Values = {"faithfulness": self._faithfulness(c.delta / self.world.size)}
        if c.locality:
            values["locality"] = self.engine.locality(now.locality, c.locality / self.world.size)
        # E. Minimality.
        losses, grad_sums = self.minimality.losses(self.world.add(sums), n, now)
        values |= losses | {"l0": self.world.add(l0) / max(n, 1)}
        reconstruction = {name: sums.new_zeros(()) for name in RECONSTRUCTION}
        ascended, grad_sources = self.sources.updates, list[tuple[MicroBatch, Tensor]]()
        for micro_batch in self.split.micro_batches:
            clean = clean or self.engine.clean(micro_batch, tokens, token_mask, penalty)
            # C. The adversary's first ascents.
            for k in range(ascents):
                self.adversary.ascend_alone(clean, samples, counts.attacked, now.adversary_lr, ascended + k + 1)
            # F, G. Stochastic and adversarial reconstruction.
            grad_g = torch.zeros_like(clean.z)
            for result in passes.run(clean, self.done, samples, counts, grad_g):
                for name, loss in result.losses.items():
                    reconstruction[name] += loss
                if result.grad_sources is not None:
                    grad_sources.append((micro_batch, result.grad_sources))
            # H. Γ's gradients, from those of the importances in all passes; then one update of V, U and Γ.
            self.engine.backward_into_gamma(clean, grad_g, grad_sums, penalty)
            del grad_g
            clean = None
        values |= self._added(reconstruction)
        metrics = self._update(values, now)
        # I. The adversary's last ascent. The gradient is that of c · L_adv, from before the update.
        for micro_batch, gradient in grad_sources:
            self.adversary.ascend(micro_batch, gradient.div_(c.adversarial), now.adversary_lr, ascended + ascents + 1)
        self.done += 1
        return metrics

    def after_update(self) -> None:
        """Copies what has changed to tied sites, and discards what processes have gathered of it."""
        after_update(self.decomposition)
        self.ties.follow()

    # -- inside a step ---------------------------------------------------------------------------------------------

    def _count(self, tokens: Tensor, token_mask: Tensor | None) -> tuple[TokenCounts, int]:
        """Real tokens of the whole batch, on the device, and of all rows as a number."""
        split, first = self.split, self.split.rows[0]
        real = torch.full(tokens.shape[:1], float(self.pos)) if token_mask is None else token_mask.sum(1).float().cpu()
        kinds = [split.rows, split.attacked, split.stochastic]
        on_cpu = torch.stack([real[[row - first for row in rows]].sum() for rows in kinds])
        counts = self.world.add(on_cpu.to(self.decomposition.device))
        n = int(on_cpu[0] if self.world.size == 1 else counts[0])
        return TokenCounts(*counts.to(self.matrices[0].dtype).unbind()), n

    def _sums(
        self, tokens: Tensor, token_mask: Tensor | None, penalty: Penalty
    ) -> tuple[Float[Tensor, " C_total"], Float[Tensor, ""], CleanForward | None]:
        """``s_c`` and L0 summed over this process's rows; with one micro-batch, its clean forward too."""
        if len(self.split.micro_batches) == 1:
            clean = self.engine.clean(self.split.micro_batches[0], tokens, token_mask, penalty)
            return clean.sums.detach().clone(), clean.l0.clone(), clean
        sums = l0 = torch.zeros((), device=self.decomposition.device)
        for micro_batch in self.split.micro_batches:
            with torch.no_grad():
                clean = self.engine.clean(micro_batch, tokens, token_mask, penalty)
            sums, l0 = sums + clean.sums, l0 + clean.l0
        return sums, l0, None

    def _faithfulness(self, coefficient: float) -> Float[Tensor, ""]:
        """The loss; its gradients, times the coefficient, go to V and U."""
        return self.engine.faithfulness(self.weights, coefficient, relative=self.config.faithfulness.kind == "relative")

    def _added(self, reconstruction: Values) -> Values:
        """Reconstruction losses, summed over processes."""
        return dict(
            zip(reconstruction, self.world.add(torch.stack(list(reconstruction.values()))).unbind(), strict=True)
        )

    def _update(self, values: Values, now: Schedule) -> StepMetrics:
        """Checks the losses, clips gradients, updates V, U and Γ."""
        numbers = dict(zip(values, torch.stack([v.double() for v in values.values()]).tolist(), strict=True))
        total = self._total(numbers, now)
        if not math.isfinite(total):
            wrong = [name for name, value in numbers.items() if not math.isfinite(value)]
            raise FloatingPointError(f"Step {self.done}: not finite: {', '.join(wrong) or 'total'} ({numbers}).")
        self._add_gradients(self.parameters)
        norm = self._clip(numbers)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * now.rate
            optimizer.step()
        self.after_update()
        lr = self.config.optimizer.lr * now.rate
        return StepMetrics(step=self.done, total=total, p=now.p, lr=lr, grad_norm=norm, **numbers)

    def _clip(self, numbers: Mapping[str, float]) -> float:
        """Clips gradients; the norm of V's and U's before."""
        optimizer = self.config.optimizer
        norms = {"V and U": clip_gradients(self.matrices, optimizer.clip)}
        if optimizer.gamma_clip is not None:
            norms["Γ"] = clip_gradients(self.gamma_parameters, optimizer.gamma_clip)
        values = torch.stack(list(norms.values())).tolist()
        for whose, value in zip(norms, values, strict=True):
            if not math.isfinite(value):  # and clipped by it, every gradient would be NaN
                raise FloatingPointError(f"Step {self.done}: the gradient of {whose} is not finite ({numbers}).")
        return values[0]

    def _total(self, values: Mapping[str, float], now: Schedule) -> float:
        c = now.coefficients
        return (
            c.delta * values["faithfulness"]
            + (c.importance * values["importance"] + c.frequency * values["frequency"])
            + sum(getattr(c, name) * values[name] for name in RECONSTRUCTION)
            + c.locality * values.get("locality", 0.0)
        )

    def _add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Adds gradients of tied sites, and over processes (sharded ones have been added by backward)."""
        self.ties.collect()
        if not self.sharded:
            self.world.add_gradients(parameters)


def _engine(masked_model: MaskedModel, config: VPDConfig, execution: ExecutionConfig) -> EagerEngine:
    """What runs the passes."""
    dtype = next(masked_model.weights.weights.parameters()).dtype
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"V, U and Γ are in {dtype}, in which small updates are lost: train with decomposition.float()."
        )
    passes = masked_model, config.output, config.squash
    options = execution.model_dump(include={"precision", "blocked_logits"})
    if not execution.compile:
        return EagerEngine(*passes, **options, checkpoint=execution.checkpoint)
    backend = "inductor" if execution.compile is True else execution.compile
    choice("compile", backend, ("recorded", *torch._dynamo.list_backends(None)))
    return CompiledEngine(*passes, **options, backend=backend)
