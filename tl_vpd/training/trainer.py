"""One training step of VPD, and what lives from step to step.

Order of a step, as in the paper's own code: clean forward, Γ, the adversary's own ascents (V, U and Γ constant), the four
losses, one backward (which also gives the adversary's last gradient), clip V and U, AdamW, and then the adversary's last
update with the gradient from before the weights moved.

    >>> trainer = Trainer(tapped, config, shape=(32, 64))        # doctest: +SKIP
    >>> trainer.step(tokens)                                    # doctest: +SKIP
    StepMetrics(...)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_vpd.decomposition import Decomposition
from tl_vpd.hooks.tapped import TappedModel
from tl_vpd.importance import lower_leaky
from tl_vpd.masking import PersistentSources, masks_from_sources, uniform_k_routing
from tl_vpd.training.config import VPDConfig
from tl_vpd.training.losses import Reconstruction, faithfulness, frequency_minimality, importance_minimality, power_sums
from tl_vpd.training.schedules import cosine, linear, warm_up

Routing = dict[str, Bool[Tensor, "batch pos"]] | None


@dataclass(frozen=True)
class Draws:
    """The random choices of one step."""

    sources: Float[Tensor, "batch pos C_and_deltas"]
    stochastic_routing: Routing
    adversarial_routing: Routing


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


class Trainer:
    """V, U and Γ of a decomposition under training, with both optimizers, the adversary and the random state.

    Args:
        tapped: an entered ``TappedModel`` of the decomposition and its target.
        shape: (batch, pos) of every batch.
    """

    def __init__(self, tapped: TappedModel, config: VPDConfig, shape: tuple[int, int]) -> None:
        self.tapped, self.config = tapped, config
        if not isinstance(tapped.parts, Decomposition):
            raise TypeError("A Trainer needs a tapped Decomposition: bare Components have no Γ.")
        self.decomposition = tapped.parts
        self.weights = {name: tapped.adapter.weight(name) for name in self.decomposition.sites}
        self.matrices = list(self.decomposition.components.parameters())
        gamma_lr = config.gamma_lr or config.lr
        groups = [
            {"params": self.matrices, "lr": config.lr, "peak": config.lr},
            {"params": list(self.decomposition.gamma.parameters()), "lr": gamma_lr, "peak": gamma_lr},
        ]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        self.generator = torch.Generator(self.decomposition.device).manual_seed(config.seed)
        self.sources = PersistentSources(
            self.decomposition.packing,
            shape,
            generator=self.generator,
            betas=config.adversary.betas,
            eps=config.adversary.eps,
        )
        self.done = 0

    def warm_up(self) -> float:
        """Faithfulness alone, on V and U, with an AdamW of its own; gives the last loss."""
        optimizer = torch.optim.AdamW(self.matrices, lr=self.config.warm_up_lr, weight_decay=0.0, fused=True)
        loss = faithfulness(self.decomposition.components, self.weights)
        for _ in range(self.config.warm_up_steps):
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            loss = faithfulness(self.decomposition.components, self.weights)
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def step(self, tokens: Int[Tensor, "batch pos"], keep: Bool[Tensor, "batch pos"] | None = None) -> StepMetrics:
        """One update of V, U, Γ and the adversary; ``keep`` is False at padding.

        Raises:
            FloatingPointError: a loss is not finite (nothing has been updated then).
        """
        config, c, packing = self.config, self.config.coefficients, self.decomposition.packing
        p = linear(self.done, config.steps, config.p_start, config.p_end)
        adversary_lr = config.adversary.lr * warm_up(self.done, config.steps, config.adversary.warm_up)
        ramp = warm_up(self.done, config.steps, config.minimality_warm_up)
        logits, inputs = self.tapped.clean(tokens, keep)
        distance = Reconstruction(logits, config.output, keep)
        z = self.decomposition.pre_sigmoid(inputs, keep)
        g = lower_leaky(z)
        draws = self.draw(tokens)

        def masked(sources: Tensor, routing: Routing, constant_parts: bool = False) -> Float[Tensor, ""]:
            importances = g.detach() if constant_parts else g
            masks = masks_from_sources(importances, sources, packing, routing)
            return distance(self.tapped.masked(tokens, masks, keep, constant_parts=constant_parts))

        if c.adversarial:
            for _ in range(config.adversary.inner_steps):
                leaf = self.sources.leaf()
                loss = masked(leaf, draws.adversarial_routing, constant_parts=True)
                (gradient,) = torch.autograd.grad(loss, leaf)
                self.sources.ascend(gradient, adversary_lr)
        leaf = self.sources.leaf()
        sums, n_tokens = power_sums(z, p, keep)
        zero = z.new_zeros(())
        parts = {
            "faithfulness": faithfulness(self.decomposition.components, self.weights),
            "importance": importance_minimality(sums, n_tokens),
            "frequency": frequency_minimality(sums, n_tokens),
            "stochastic": masked(draws.sources, draws.stochastic_routing) if c.stochastic else zero,
            "adversarial": masked(leaf, draws.adversarial_routing) if c.adversarial else zero,
        }
        total = (
            c.delta * parts["faithfulness"]
            + ramp * c.importance * parts["importance"]
            + ramp * c.frequency * parts["frequency"]
            + c.stochastic * parts["stochastic"]
            + c.adversarial * parts["adversarial"]
        )
        values = {name: float(value.detach()) for name, value in parts.items()}
        if not bool(total.isfinite()):
            wrong = [name for name, value in values.items() if not math.isfinite(value)]
            raise FloatingPointError(f"Step {self.done}: not finite: {', '.join(wrong) or 'total'} ({values}).")
        norm, rate = self._update(total)
        if c.adversarial and leaf.grad is not None:
            # The total holds c · L_adv; Adam wants the gradient of L_adv itself, from before the weights moved.
            self.sources.ascend(leaf.grad / c.adversarial, adversary_lr)
        real = g.detach() if keep is None else g.detach()[keep]
        metrics = StepMetrics(
            step=self.done,
            total=float(total.detach()),
            l0=float((real > 0).sum() / n_tokens),
            p=p,
            lr=config.lr * rate,
            grad_norm=norm,
            **values,
        )
        self.done += 1
        return metrics

    def draw(self, tokens: Int[Tensor, "batch pos"]) -> Draws:
        """What a step draws at random: the stochastic pass's sources and both routings."""
        shape = self.sources.values.shape
        return Draws(
            sources=torch.rand(shape, generator=self.generator, device=self.generator.device),
            stochastic_routing=self._routing(tokens, self.config.stochastic_routing),
            adversarial_routing=self._routing(tokens, self.config.adversary.routing),
        )

    def _update(self, total: Float[Tensor, ""]) -> tuple[float, float]:
        """Backward, clip, AdamW; gives the norm of V's and U's gradient before clipping and the rate's factor."""
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.matrices, self.config.clip or float("inf"))
        rate = cosine(self.done, self.config.steps, self.config.lr_final)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        self.optimizer.step()
        return float(norm), rate

    def _routing(self, tokens: Tensor, kind: str) -> Routing:
        if kind == "all":
            return None
        names = self.decomposition.packing.names
        return uniform_k_routing(names, (tokens.shape[0], tokens.shape[1]), generator=self.generator)
