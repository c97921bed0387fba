"""One training step of VPD, and what lives from step to step.

Order of a step, as in the paper's own code: clean forward, Γ, the adversary's own ascents (V, U and Γ constant), the four
losses, one backward (which also gives the adversary's last gradient), clip V and U, AdamW, and then the adversary's last
update with the gradient from before the weights moved.

A batch may be run in parts (``micro_batch``) and shared by processes (``tl_vpd.training.distributed.processes``). Means over tokens are then
weighted by the parts' real tokens, and the minimality losses, which are no sums over tokens, are differentiated once, in
the sums ``s_c`` of the whole batch:

    ∇ L_min = Σ_c (∂L_min/∂s_c) ∇ s_c,      s_c = Σ over parts and processes

    >>> trainer = Trainer(tapped, config, shape=(32, 64))        # doctest: +SKIP
    >>> trainer.step(tokens)                                    # doctest: +SKIP
    StepMetrics(...)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from tl_vpd.forward.masked_model import MaskedModel
from tl_vpd.losses import (
    Penalty,
    RunningFrequency,
    frequency_minimality,
    importance_minimality,
)
from tl_vpd.masking import PersistentSources, taken_rows
from tl_vpd.training.config import ExecutionConfig, VPDConfig
from tl_vpd.training.distributed.processes import World
from tl_vpd.training.distributed.sharding import Sharding
from tl_vpd.training.engine.compiled import CompiledEngine
from tl_vpd.training.engine.eager import CleanForward, EagerEngine, LossTerm, MaskInputs
from tl_vpd.training.micro_batch import MicroBatch, joined_routing, routed_rows, share
from tl_vpd.training.schedules import Schedule
from tl_vpd.training.step_samples import StepSampler, StepSamples, expected_share
from tl_vpd.training.ties import Ties

LOSSES = ("faithfulness", "importance", "frequency", "stochastic", "adversarial", "layerwise")


@dataclass(frozen=True)
class StepMetrics:
    """What a step measured, before its update. Reconstructions in nats (or squared error), ``l0`` a token."""

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


Reconstructed = tuple[dict[int, Float[Tensor, ""]], Tensor | None]
"""Losses of one masked pass by place (0 stochastic, 1 adversarial, 2 layerwise), and its sources' gradient."""


class Trainer:
    """V, U and Γ of a decomposition under training, with both optimizers, the adversary and the random state.

    Args:
        masked_model: an entered ``MaskedModel`` of the decomposition and its target.
        config: what is learned.
        shape: (batch, pos) of every batch, over all processes; pos is 1 for inputs ``[batch, d]``.
        execution: how it runs (None: ``ExecutionConfig()``).
        world: the processes that split the batch (None: one).
        sharding: what each of them stores of V, U, Γ and moments (None: all).

    Raises:
        ValueError: the batch cannot be split.
        Unsupported: ``checkpoint`` with a model that is no stack of layers, ``blocked_logits`` with one whose logits are more
            than a product (said by the first step), or ``compile`` with one not in V's and U's dtype.
    """

    def __init__(
        self,
        masked_model: MaskedModel,
        config: VPDConfig,
        shape: tuple[int, int],
        *,
        execution: ExecutionConfig | None = None,
        world: World | None = None,
        sharding: Sharding | None = None,
    ) -> None:
        self.masked_model, self.config, self.world = masked_model, config, world or World()
        self.execution = execution = execution or ExecutionConfig()
        self.sharding = sharding or Sharding(self.world)
        self.how = {
            **execution.model_dump(include={"compile", "micro_batch", "blocked_logits"}),
            "processes": self.world.size,
            "sharding": type(self.sharding).__name__,
        }
        """What changes results to rounding only."""
        passes = masked_model, config.output, config.squash
        options = execution.model_dump(include={"precision", "blocked_logits"})
        self.engine: EagerEngine
        if execution.compile:
            backend = "inductor" if execution.compile is True else execution.compile
            self.engine = CompiledEngine(*passes, **options, backend=backend)
        else:
            self.engine = EagerEngine(*passes, **options, checkpoint=execution.checkpoint)
        self.decomposition = self.engine.decomposition
        self.weights = {name: masked_model.adapter.weight(name) for name in self.decomposition.sites}
        self.ties = Ties(self.decomposition.components, config.tied)
        if config.tied and self.sharding.kind != "none":
            raise ValueError(
                f"Tied sites are not split among processes: sharding={self.sharding.kind!r} needs tied=()."
            )
        self.matrices = self.ties.free(self.sharding.kept(self.decomposition.components))
        gamma = self.sharding.kept(self.decomposition.gamma)
        lr, gamma_lr = config.optimizer.lr, config.optimizer.gamma_lr or config.optimizer.lr
        groups = [
            {"params": self.matrices, "lr": lr, "peak": lr},
            {"params": gamma, "lr": gamma_lr, "peak": gamma_lr},
        ]
        self.parameters = [*self.matrices, *gamma]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        self.pos = shape[1]
        self.shares = share(self.world.rows(shape[0]), execution.micro_batch, merged=config.merged)
        site_axis, device = self.decomposition.site_axis, self.decomposition.device
        self.draws = StepSampler(config, self.shares, pos=self.pos, site_axis=site_axis, device=device)
        self.sources = PersistentSources(self.draws.start(), betas=config.adversary.betas, eps=config.adversary.eps)
        self.frequencies: RunningFrequency | None = None
        if config.minimality.frequency_half_life is not None:
            self.frequencies = RunningFrequency(site_axis.total, config.minimality.frequency_half_life, device=device)
        self.done = 0

    def warm_up(self) -> float:
        """Faithfulness alone, on V and U, with an AdamW of its own; gives the last loss."""
        optimizer = torch.optim.AdamW(
            self.matrices, lr=self.config.faithfulness.warm_up_lr, weight_decay=0.0, fused=True
        )
        for _ in range(self.config.faithfulness.warm_up_steps):
            optimizer.zero_grad(set_to_none=True)
            self._faithfulness(1 / self.world.size)
            self._collect(self.matrices)
            optimizer.step()
            self.spread(self.matrices)
        optimizer.zero_grad(set_to_none=True)
        return float(self._faithfulness(0.0))

    def step(
        self, tokens: Shaped[Tensor, "batch ..."], token_mask: Bool[Tensor, "batch pos"] | None = None
    ) -> StepMetrics:
        """One update of V, U, Γ and the adversary on this process's rows; ``token_mask`` is False at padding.

        Tokens are ``[batch, pos]``; models of people's own may take vectors, ``[batch, pos, d]`` or ``[batch, d]``.

        Raises:
            ValueError: there are more or fewer rows than the trainer was made for.
            FloatingPointError: a loss is not finite (V, U and Γ have not been updated then; the adversary may have been).
        """
        if len(tokens) != len(self.shares.rows):
            raise ValueError(f"This trainer takes {len(self.shares.rows)} rows a step, and was given {len(tokens)}.")
        config, c = self.config, self.config.coefficients
        now = Schedule.at(self.done, config)
        draws = self.draws.at(self.done)
        counts = self._count(tokens, token_mask)
        parts = self.shares.micro_batches
        alone = self.engine.clean(parts[0], tokens, token_mask, self._penalty(now)) if len(parts) == 1 else None
        sums, l0 = self._sums(tokens, token_mask, now) if alone is None else (alone.sums.detach().clone(), alone.l0)
        values, slope = self._minimality(self.world.add(sums), int(counts[0]), now)
        self.world.add(l0)

        # Also what is no parameter of the optimizer's: followers, and gradients that a refused step has left.
        self.optimizer.zero_grad(set_to_none=True)
        self.decomposition.zero_grad(set_to_none=True)
        values["faithfulness"] = self._faithfulness(c.delta / self.world.size)
        before = self.sources.updates
        reconstruction = torch.zeros(3, device=slope.device)
        waiting: list[tuple[MicroBatch, Tensor]] = []
        for part in parts:
            own = alone or self.engine.clean(part, tokens, token_mask, self._penalty(now))
            for k in range(config.adversary.inner_steps if c.adversarial else 0):
                self._ascend(own, draws, counts, now.adversary_lr, before + k + 1)
            grad_g = self.engine.workspace("grad_g", own.z.shape, own.z.dtype).zero_()
            for losses, of_sources in self._reconstruct(own, grad_g, draws, counts):
                # Γ's own gradients come last, from what all passes left in grad_g.
                for k, loss in losses.items():
                    reconstruction[k] += loss
                if of_sources is not None:
                    waiting.append((part, of_sources if len(parts) == 1 else of_sources.clone()))
            self.engine.into_gamma(own, grad_g, slope, self._penalty(now))
            del own
            alone = None
        values["stochastic"], values["adversarial"], values["layerwise"] = self.world.add(reconstruction)
        norm = self._update(values, now)
        for part, gradient in waiting:
            # The loss holds c · L_adv; Adam wants the gradient of L_adv itself, from before the weights moved.
            last = before + config.adversary.inner_steps + 1
            self._update_sources(part, gradient.div_(c.adversarial), now.adversary_lr, last)
        metrics = StepMetrics(
            step=self.done,
            total=float(self._total(values, now)),
            l0=float(l0) / float(counts[0]),
            p=now.p,
            lr=config.optimizer.lr * now.rate,
            grad_norm=norm,
            **{name: float(values[name]) for name in LOSSES},
        )
        self.done += 1
        return metrics

    def draw_sources(self, what: str, rows: Sequence[int]) -> Float[Tensor, "tokens C_and_deltas"]:
        """This step's ``stochastic`` or ``layerwise`` sources of some rows, in a tensor that the next call may use again."""
        out = self.engine.workspace("sources", (len(rows), self.pos, self.draws.width))
        return self.draws.sources(what, self.done, rows, out).flatten(0, 1)

    # -- parts of a step -------------------------------------------------------------------------------------------

    def _count(self, tokens: Tensor, token_mask: Tensor | None) -> Float[Tensor, "3"]:
        """Real tokens of the whole batch: of all rows, of the attacked, of those with stochastic masks."""
        real = torch.full(tokens.shape[:1], float(self.pos)) if token_mask is None else token_mask.sum(1).float().cpu()
        first = self.shares.rows[0]
        of = [real, *(real[[r - first for r in rows]] for rows in (self.shares.attacked, self.shares.drawn))]
        counts = torch.stack([own.sum() for own in of]).to(self.decomposition.device)
        return self.world.add(counts)

    def _penalty(self, now: Schedule) -> Penalty:
        kind = self.config.minimality.kind
        return Penalty(kind, now.p if kind == "power" else now.smooth)

    @torch.no_grad()
    def _sums(self, tokens: Tensor, token_mask: Tensor | None, now: Schedule) -> tuple[Tensor, Tensor]:
        """What minimality and L0 need of the whole batch, part by part, before any part's gradients."""
        sums, l0 = torch.zeros(self.decomposition.site_axis.total, device=self.decomposition.device), None
        for part in self.shares.micro_batches:
            own = self.engine.clean(part, tokens, token_mask, self._penalty(now))
            sums = sums + own.sums
            l0 = own.l0 if l0 is None else l0 + own.l0
        assert l0 is not None
        return sums, l0

    def _minimality(self, sums: Tensor, n: int, now: Schedule) -> tuple[dict[str, Tensor], Tensor]:
        """Both minimality losses of the whole batch, and what a change of each ``s_c`` does to the total."""
        c, leaf = self.config.coefficients, sums.requires_grad_()
        at = None if self.frequencies is None else self.frequencies.update(sums.detach() / n)
        values = {
            "importance": importance_minimality(leaf, n),
            "frequency": frequency_minimality(leaf, n, reference=self.config.minimality.frequency_reference, at=at),
        }
        weighted = now.minimality * (c.importance * values["importance"] + c.frequency * values["frequency"])
        (slope,) = torch.autograd.grad(weighted, leaf)
        return {name: value.detach() for name, value in values.items()}, slope

    def _attacked(self, own: CleanForward, draws: StepSamples) -> MaskInputs:
        """What a part's attacked rows take."""
        at = own.part.attacked
        values = self.sources.values[at]
        rows = None if draws.slots is None else taken_rows(draws.slots[at], values.shape[1])
        routing = routed_rows(draws.adversarial_routing, at)
        return MaskInputs(values.flatten(0, 1), rows, routing, expected=expected_share(routing))

    def _ascend(self, own: CleanForward, draws: StepSamples, counts: Tensor, lr: float, update: int) -> None:
        """One of the adversary's own steps, on a part's attacked rows."""
        attacked = self._attacked(own, draws)
        gradient = self._of_sources(attacked)
        self.engine.attack(own, own.attacked, attacked, counts[1], grad_sources=gradient)
        self._update_sources(own.part, gradient, lr, update)

    def _of_sources(self, attacked: MaskInputs) -> Tensor:
        return self.engine.workspace("sources", attacked.sources.shape, attacked.sources.dtype).zero_()

    def _update_sources(self, part: MicroBatch, gradient: Tensor, lr: float, update: int) -> None:
        values = self.sources.values[part.attacked]
        self.engine.ascend(self.sources, gradient.view_as(values), lr, part.attacked, update)

    def _reconstruct(
        self, own: CleanForward, grad_g: Tensor, draws: StepSamples, counts: Tensor
    ) -> Iterator[Reconstructed]:
        """A part's shares of the stochastic (0), the adversarial (1) and the layerwise loss (2), pass by pass."""
        c, run = self.config.coefficients, self.engine.reconstruct
        if c.layerwise:
            drawn = self.draw_sources("layerwise", own.part.numbers(self.shares.rows))
            names = self.decomposition.site_axis.names
            share = LossTerm(len(names) * counts[0], c.layerwise)
            for name in names:
                yield (
                    dict(zip((2,), run(own, MaskInputs(drawn, sites=(name,)), [share], grad_g=grad_g), strict=True)),
                    None,
                )
        if self.config.merged:
            yield self._both(own, grad_g, draws, counts)
            return
        if c.stochastic:
            routing = routed_rows(draws.stochastic_routing, own.part.drawn)
            free = MaskInputs(self._drawn(own.part), routing=routing, expected=expected_share(routing))
            (loss,) = run(own, free, [LossTerm(counts[2], c.stochastic)], grad_g=grad_g)
            yield {0: loss}, None
        if c.adversarial:
            attacked = self._attacked(own, draws)
            gradient = self._of_sources(attacked)
            (loss,) = run(own, attacked, [LossTerm(counts[1], c.adversarial)], grad_g=grad_g, grad_sources=gradient)
            yield {1: loss}, gradient

    def _both(self, own: CleanForward, grad_g: Tensor, draws: StepSamples, counts: Tensor) -> Reconstructed:
        """The merged recipe's one pass: attacked rows followed by rows with stochastic sources."""
        c, rows, attacked = self.config.coefficients, own.attacked, self._attacked(own, draws)
        drawn, free = self._drawn(own.part), routed_rows(draws.stochastic_routing, own.part.drawn)
        taken = attacked.rows
        if taken is not None:
            taken = torch.cat([taken, len(attacked.sources) + torch.arange(len(drawn), device=drawn.device)])
        expected = rows.stop * attacked.expected + (len(own.tokens) - rows.stop) * expected_share(free)
        both = MaskInputs(
            torch.cat([attacked.sources, drawn]),
            taken,
            joined_routing(attacked.routing, free, rows),
            expected=expected / len(own.tokens),
        )
        shares = [
            LossTerm(counts[1], c.adversarial, rows, rows),
            LossTerm(counts[2], c.stochastic, slice(rows.stop, None), slice(rows.stop, None)),
        ]
        gradient = self._of_sources(attacked) if c.adversarial else None
        adversarial, stochastic = self.engine.reconstruct(own, both, shares, grad_g=grad_g, grad_sources=gradient)
        return {0: stochastic, 1: adversarial}, gradient

    def _drawn(self, part: MicroBatch) -> Float[Tensor, "tokens C_and_deltas"]:
        return self.draw_sources("stochastic", self.shares.drawn[part.drawn])

    def _faithfulness(self, coefficient: float) -> Float[Tensor, ""]:
        """The loss; its gradients, times the coefficient, go to V and U."""
        return self.engine.faithfulness(self.weights, coefficient, relative=self.config.faithfulness.kind == "relative")

    def _total(self, values: dict[str, Tensor], now: Schedule) -> Tensor:
        c = self.config.coefficients
        return (
            c.delta * values["faithfulness"]
            + now.minimality * (c.importance * values["importance"] + c.frequency * values["frequency"])
            + c.stochastic * values["stochastic"]
            + c.adversarial * values["adversarial"]
            + c.layerwise * values["layerwise"]
        )

    def _update(self, values: dict[str, Tensor], now: Schedule) -> float:
        """Checks the losses, clips, AdamW; gives the norm of V's and U's gradient before clipping."""
        if not bool(self._total(values, now).isfinite()):
            numbers = {name: float(value) for name, value in values.items()}
            wrong = [name for name, value in numbers.items() if not math.isfinite(value)]
            raise FloatingPointError(f"Step {self.done}: not finite: {', '.join(wrong) or 'total'} ({numbers}).")
        self._collect(self.parameters)
        norm = self.sharding.clip(self.matrices, self.config.optimizer.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * now.rate
        self.optimizer.step()
        self.spread(self.parameters)
        return norm

    def _collect(self, kept: Sequence[nn.Parameter]) -> None:
        """Sums what backward left: over tied sites, and over processes."""
        self.ties.collect()
        self.sharding.collect(kept)

    def spread(self, kept: Sequence[nn.Parameter]) -> None:
        """Lets other processes, and tied sites, have what has changed."""
        self.sharding.spread(kept)
        self.ties.follow()
