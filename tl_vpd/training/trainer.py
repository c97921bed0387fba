"""One training step of VPD, and what lives from step to step.

Order of a step, as in the paper's own code: clean forward, Γ, the adversary's own ascents (V, U and Γ constant), the four
losses, one backward (which also gives the adversary's last gradient), clip V and U, AdamW, and then the adversary's last
update with the gradient from before the weights moved.

A batch may be run in parts (``micro_batch``) and shared by processes (``tl_vpd.training.processes``). Means over tokens are then
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
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from tl_vpd.components import SourcedPass
from tl_vpd.decomposition import Decomposition
from tl_vpd.hooks.tapped import TappedModel
from tl_vpd.importance import lower_leaky
from tl_vpd.masking import PersistentSources, spread
from tl_vpd.masking.routing import uniform_k
from tl_vpd.site import Packing
from tl_vpd.training.config import VPDConfig
from tl_vpd.training.losses import (
    Reconstruction,
    RunningFrequency,
    faithfulness,
    frequency_minimality,
    importance_minimality,
    power_sums,
    smooth_sums,
)
from tl_vpd.training.parts import Part, share
from tl_vpd.training.processes import World
from tl_vpd.training.random import START, RowRandom
from tl_vpd.training.schedules import Schedule
from tl_vpd.training.sharding import Sharding

Routing = dict[str, Bool[Tensor, "_ pos"]] | None
LOSSES = ("faithfulness", "importance", "frequency", "stochastic", "adversarial", "layerwise")


@dataclass(frozen=True)
class Draws:
    """The random choices of one step: for rows with stochastic masks sources and routing, for attacked rows routing and slots,
    for all rows the sources of layerwise masks."""

    sources: Float[Tensor, "drawn pos C_and_deltas"]
    stochastic_routing: Routing
    adversarial_routing: Routing
    slots: Int[Tensor, "attacked pos"] | None = None
    layerwise: Float[Tensor, "rows pos C_and_deltas"] | None = None


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


@dataclass(frozen=True)
class _Seen:
    """A part of the batch after its clean pass: the target's output, Γ's values, importances, and sums for minimality."""

    part: Part
    tokens: Tensor
    keep: Tensor | None
    distance: Reconstruction
    g: Tensor
    sums: Tensor
    l0: Tensor


class Trainer:
    """V, U and Γ of a decomposition under training, with both optimizers, the adversary and the random state.

    Args:
        tapped: an entered ``TappedModel`` of the decomposition and its target.
        shape: (batch, pos) of every batch, over all processes; pos is 1 for inputs ``[batch, d]``.
        micro_batch: rows that are run at once (None: all of a process's).
        world: the processes that share the batch. sharding: what each of them keeps of V, U, Γ and moments (None: all).

    Raises:
        ValueError: the batch cannot be shared out.
    """

    def __init__(
        self,
        tapped: TappedModel,
        config: VPDConfig,
        shape: tuple[int, int],
        *,
        micro_batch: int | None = None,
        world: World | None = None,
        sharding: Sharding | None = None,
    ) -> None:
        self.tapped, self.config, self.world = tapped, config, world or World()
        self.sharding = sharding or Sharding(self.world)
        if not isinstance(tapped.parts.decomposition, Decomposition):
            raise TypeError("A Trainer needs a tapped Decomposition: bare Components have no Γ.")
        self.decomposition = tapped.parts.decomposition
        self.weights = {name: tapped.adapter.weight(name) for name in self.decomposition.sites}
        self.matrices = self.sharding.kept(self.decomposition.components)
        gamma = self.sharding.kept(self.decomposition.gamma)
        gamma_lr = config.gamma_lr or config.lr
        groups = [
            {"params": self.matrices, "lr": config.lr, "peak": config.lr},
            {"params": gamma, "lr": gamma_lr, "peak": gamma_lr},
        ]
        self.parameters = [*self.matrices, *gamma]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        self.pos = shape[1]
        self.shares = share(self.world.rows(shape[0]), micro_batch, merged=config.merged)
        self.random = RowRandom(config.seed, self.decomposition.device)
        self.width = self.decomposition.packing.total + len(self.decomposition.packing.names)
        slots = config.adversary.pool or self.pos
        self.sources = PersistentSources(
            self.random.uniform("sources", START, self.shares.attacked, (slots, self.width)),
            betas=config.adversary.betas,
            eps=config.adversary.eps,
        )
        self.frequencies: RunningFrequency | None = None
        if config.frequency_half_life is not None:
            total, device = self.decomposition.packing.total, self.decomposition.device
            self.frequencies = RunningFrequency(total, config.frequency_half_life, device=device)
        self.done = 0

    def warm_up(self) -> float:
        """Faithfulness alone, on V and U, with an AdamW of its own; gives the last loss."""
        optimizer = torch.optim.AdamW(self.matrices, lr=self.config.warm_up_lr, weight_decay=0.0, fused=True)
        loss = self._faithfulness()
        for _ in range(self.config.warm_up_steps):
            optimizer.zero_grad(set_to_none=True)
            (loss / self.world.size).backward()
            self.sharding.collect(self.matrices)
            optimizer.step()
            self.sharding.spread(self.matrices)
            loss = self._faithfulness()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def step(self, tokens: Shaped[Tensor, "batch ..."], keep: Bool[Tensor, "batch pos"] | None = None) -> StepMetrics:
        """One update of V, U, Γ and the adversary on this process's rows; ``keep`` is False at padding.

        Tokens are ``[batch, pos]``; models of people's own may take vectors, ``[batch, pos, d]`` or ``[batch, d]``.

        Raises:
            FloatingPointError: a loss is not finite (V, U and Γ have not been updated then).
        """
        config, c = self.config, self.config.coefficients
        now = Schedule.at(self.done, config)
        draws = self.draw(tokens)
        counts = self._count(tokens, keep)
        parts = self.shares.parts
        alone = self._see(parts[0], tokens, keep, now) if len(parts) == 1 else None
        sums, l0 = self._sums(tokens, keep, now) if alone is None else (alone.sums.detach().clone(), alone.l0)
        values, slope = self._minimality(self.world.add(sums), int(counts[0]), now)
        self.world.add(l0)

        self.optimizer.zero_grad(set_to_none=True)
        faith = self._faithfulness()
        (c.delta * faith / self.world.size).backward()
        values["faithfulness"] = faith.detach()
        leaf, before = self.sources.leaf(), self.sources.updates
        reconstruction = leaf.new_zeros(3)
        for part in parts:
            own = alone or self._see(part, tokens, keep, now)
            for k in range(config.adversary.inner_steps if c.adversarial else 0):
                self._ascend(own, draws, counts, now.adversary_lr, before + k + 1)
            g = own.g.detach().requires_grad_()
            for losses in self._reconstruct(own, g, draws, leaf, counts):
                # One pass's graph at a time; Γ's own comes last, from what all passes left in g.
                weights = (c.stochastic, c.adversarial, c.layerwise)
                torch.stack([weights[k] * loss for k, loss in losses.items()]).sum().backward()
                for k, loss in losses.items():
                    reconstruction[k] += loss.detach()
            torch.autograd.backward([own.g, own.sums], [torch.zeros_like(g) if g.grad is None else g.grad, slope])
        values["stochastic"], values["adversarial"], values["layerwise"] = self.world.add(reconstruction)
        norm = self._update(values, now)
        if c.adversarial and leaf.grad is not None:
            # The loss holds c · L_adv; Adam wants the gradient of L_adv itself, from before the weights moved.
            self.sources.ascend(leaf.grad / c.adversarial, now.adversary_lr)
        metrics = StepMetrics(
            step=self.done,
            total=float(self._total(values, now)),
            l0=float(l0) / float(counts[0]),
            p=now.p,
            lr=config.lr * now.rate,
            grad_norm=norm,
            **{name: float(values[name]) for name in LOSSES},
        )
        self.done += 1
        return metrics

    def draw(self, tokens: Shaped[Tensor, "batch ..."]) -> Draws:
        """What a step draws at random for this process's rows."""
        config, shares, pool = self.config, self.shares, self.config.adversary.pool
        slots = None
        if pool is not None:
            uniform = self.random.uniform("slots", self.done, shares.attacked, (self.pos,))
            slots = (uniform * pool).long().clamp_(max=pool - 1)
        layerwise = None
        if config.coefficients.layerwise:
            layerwise = self.random.uniform("layerwise", self.done, shares.rows, (self.pos, self.width))
        return Draws(
            sources=self.random.uniform("stochastic", self.done, shares.drawn, (self.pos, self.width)),
            stochastic_routing=self._routing("routing", shares.drawn, config.stochastic_routing),
            adversarial_routing=self._routing("attacked", shares.attacked, config.adversary.routing),
            slots=slots,
            layerwise=layerwise,
        )

    # -- parts of a step -------------------------------------------------------------------------------------------

    def _routing(self, what: str, rows: Sequence[int], kind: str) -> Routing:
        if kind == "all":
            return None
        names = self.decomposition.packing.names
        drawn = self.random.rows(what, self.done, rows, lambda g: uniform_k(len(names), (self.pos,), generator=g))
        return dict(zip(names, drawn.unbind(1), strict=True))

    def _count(self, tokens: Tensor, keep: Tensor | None) -> Float[Tensor, "3"]:
        """Real tokens of the whole batch: of all rows, of the attacked, of those with stochastic masks."""
        real = torch.full(tokens.shape[:1], float(self.pos)) if keep is None else keep.sum(1).float().cpu()
        first = self.shares.rows[0]
        of = [real, *(real[[r - first for r in rows]] for rows in (self.shares.attacked, self.shares.drawn))]
        counts = torch.stack([own.sum() for own in of]).to(self.decomposition.device)
        return self.world.add(counts)

    def _see(self, part: Part, tokens: Tensor, keep: Tensor | None, now: Schedule) -> _Seen:
        own, kept = part.of(tokens), part.of(keep)
        assert own is not None
        logits, inputs = self.tapped.clean(own, kept)
        z = self.decomposition.pre_sigmoid(inputs, kept)
        sums, _ = power_sums(z, now.p, kept) if self.config.minimality == "power" else smooth_sums(z, now.smooth, kept)
        g = lower_leaky(z)
        important = (g.detach() > 0) if kept is None else (g.detach() > 0) & kept[..., None]
        return _Seen(part, own, kept, Reconstruction(logits, self.config.output, kept), g, sums, important.sum())

    @torch.no_grad()
    def _sums(self, tokens: Tensor, keep: Tensor | None, now: Schedule) -> tuple[Tensor, Tensor]:
        """What minimality and L0 need of the whole batch, part by part, before any part's gradients."""
        sums, l0 = torch.zeros(self.decomposition.packing.total, device=self.decomposition.device), None
        for part in self.shares.parts:
            own = self._see(part, tokens, keep, now)
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
            "frequency": frequency_minimality(leaf, n, reference=self.config.frequency_reference, at=at),
        }
        weighted = now.minimality * (c.importance * values["importance"] + c.frequency * values["frequency"])
        (slope,) = torch.autograd.grad(weighted, leaf)
        return {name: value.detach() for name, value in values.items()}, slope

    def _masked(self, own: _Seen, g: Tensor, rows: slice, sources: Tensor, routing: Routing, **how: bool) -> Tensor:
        """The masked model's output on some rows of a part."""
        if g.ndim == 2:  # inputs without positions
            sources, routing = sources.squeeze(1), routing and {name: at.squeeze(1) for name, at in routing.items()}
        run = SourcedPass(g[rows], sources, self.decomposition.packing, routing)
        return self.tapped.masked(own.tokens[rows], run, None if own.keep is None else own.keep[rows], **how)

    def _alone(self, own: _Seen, g: Tensor, sources: Tensor, name: str) -> Tensor:
        """The model's output with one site masked."""
        packing = self.decomposition.packing
        columns = packing.slices[name]
        delta = packing.total + packing.names.index(name)
        here = torch.cat([sources[..., columns], sources[..., delta : delta + 1]], dim=-1)
        run = SourcedPass(
            g[..., columns], here.squeeze(1) if g.ndim == 2 else here, Packing({name: packing.counts[name]})
        )
        return self.tapped.masked(own.tokens, run, own.keep)

    def _attacked_rows(self, own: _Seen) -> slice:
        return slice(0, own.part.attacked.stop - own.part.attacked.start)

    def _ascend(self, own: _Seen, draws: Draws, counts: Tensor, lr: float, update: int) -> None:
        """One of the adversary's own steps, on a part's attacked rows."""
        at, rows = own.part.attacked, self._attacked_rows(own)
        leaf = self.sources.leaf(at)
        slots = None if draws.slots is None else draws.slots[at]
        routing = _rows(draws.adversarial_routing, at)
        output = self._masked(own, own.g.detach(), rows, spread(leaf, slots), routing, constant_parts=True)
        loss = _weighted(own.distance.rows(rows), output, counts[1])
        (gradient,) = torch.autograd.grad(loss, leaf)
        self.sources.ascend(gradient, lr, at, update=update)

    def _reconstruct(
        self, own: _Seen, g: Tensor, draws: Draws, leaf: Tensor, counts: Tensor
    ) -> Iterator[dict[int, Float[Tensor, ""]]]:
        """A part's shares of the stochastic loss (0), the adversarial loss (1) and the layerwise loss (2), as each pass ends."""
        c, at, rows = self.config.coefficients, own.part.attacked, self._attacked_rows(own)
        slots = None if draws.slots is None else draws.slots[at]
        every = slice(None)
        names = self.decomposition.packing.names
        for name in names if c.layerwise else ():
            sources = own.part.of(draws.layerwise)
            assert sources is not None
            yield {2: _weighted(own.distance, self._alone(own, g, sources, name), counts[0]) / len(names)}
        if self.config.merged:
            sources = torch.cat([spread(leaf[at], slots), draws.sources[own.part.drawn]])
            routing = _joined(
                _rows(draws.adversarial_routing, at), _rows(draws.stochastic_routing, own.part.drawn), rows
            )
            output, rest = self._masked(own, g, every, sources, routing), slice(rows.stop, None)
            yield {
                0: _weighted(own.distance.rows(rest), output[rest], counts[2]),
                1: _weighted(own.distance.rows(rows), output[rows], counts[1]),
            }
            return
        if c.stochastic:
            drawn = own.part.drawn
            output = self._masked(own, g, every, draws.sources[drawn], _rows(draws.stochastic_routing, drawn))
            yield {0: _weighted(own.distance, output, counts[2])}
        if c.adversarial:
            output = self._masked(own, g, every, spread(leaf[at], slots), _rows(draws.adversarial_routing, at))
            yield {1: _weighted(own.distance, output, counts[1])}

    def _faithfulness(self) -> Float[Tensor, ""]:
        relative = self.config.faithfulness == "relative"
        return faithfulness(self.decomposition.components, self.weights, relative=relative)

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
        self.sharding.collect(self.parameters)
        norm = self.sharding.clip(self.matrices, self.config.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * now.rate
        self.optimizer.step()
        self.sharding.spread(self.parameters)
        return norm


def _weighted(distance: Reconstruction, output: Tensor, total: Tensor) -> Float[Tensor, ""]:
    """A mean over these rows' real tokens, as their share of the mean over ``total`` tokens."""
    n = output[..., 0].numel() if distance.keep is None else distance.keep.sum()
    return distance(output) * (n / total)


def _rows(routing: Routing, rows: slice) -> Routing:
    return None if routing is None else {name: own[rows] for name, own in routing.items()}


def _joined(attacked: Routing, drawn: Routing, rows: slice) -> Routing:
    """One routing for attacked rows followed by the others."""
    if attacked is None and drawn is None:
        return None
    some = drawn if drawn is not None else attacked
    assert some is not None
    joined = {}
    for name, own in some.items():
        ones = torch.ones(rows.stop, own.shape[1], dtype=torch.bool, device=own.device)
        first = ones if attacked is None else attacked[name]
        last = own if drawn is not None else torch.ones_like(own)
        joined[name] = torch.cat([first, last])
    return joined
