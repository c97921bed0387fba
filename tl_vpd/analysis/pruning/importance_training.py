"""Importances of several circuits trained at once, one circuit (and λ) per row of a batch; ``prune`` states the loss."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_vpd.analysis.pruning.attack import attack, uniform_sources, within_reach
from tl_vpd.analysis.pruning.config import PruneConfig
from tl_vpd.analysis.pruning.gradients import Gradient, PromptLoss, RecordedGradient
from tl_vpd.losses.penalty import Penalty
from tl_vpd.training.schedules import cosine, warm_up


class ImportanceTraining:
    """Trains the importances of one circuit per λ (``strengths``), from Γ's pre-sigmoid values z."""

    def __init__(
        self,
        loss: PromptLoss,
        z: Float[Tensor, "pos C_total"],
        strengths: Float[Tensor, " circuits"],
        config: PruneConfig,
    ) -> None:
        self.config, self.sites = config, len(loss.masked_model.names)
        recorded = config.steps >= 100 if config.recorded is None else config.recorded
        self.behaviour_gradient: Gradient = RecordedGradient(loss) if recorded else loss.gradient
        self.alive: Bool[Tensor, "pos C_total"] = z > 0
        self.reachable = within_reach(config.reach, self.alive, self.sites)
        self.z = z[self.alive].expand(len(strengths), -1).clone().requires_grad_()
        # λ / T per node: minimality is a mean over positions.
        self.strengths = strengths / len(z)
        self.penalty = Penalty("power", config.p)
        self.generator = torch.Generator(z.device).manual_seed(config.seed)

    def run(self) -> Float[Tensor, "circuits pos C_total"]:
        """The importances after all steps."""
        config = self.config
        optimizer = torch.optim.AdamW([self.z], lr=config.lr, weight_decay=0.0)
        for step in tqdm(range(config.steps), disable=not config.progress, desc="pruning"):
            schedule = cosine(step, config.steps, 0.0) * warm_up(step + 1, config.steps, config.warm_up)
            optimizer.param_groups[0]["lr"] = config.lr * schedule
            self.z.grad = self.gradient()
            optimizer.step()
        return self.importances()

    @torch.no_grad()
    def importances(self) -> Float[Tensor, "circuits pos C_total"]:
        """g of every circuit; 0 where Γ's is 0."""
        g = self.z.new_zeros(len(self.z), *self.alive.shape)
        g[:, self.alive] = self.z.clamp(0, 1)
        return g

    @torch.no_grad()
    def gradient(self) -> Float[Tensor, "circuits alive"]:
        """The gradient of the whole loss in z."""
        grad_g = self._grad_importances(self.importances())[:, self.alive]
        rows = [
            self.penalty.pullback(z[None], strength.expand(len(z)), grad_g=row[None].clone())
            for z, strength, row in zip(self.z.detach(), self.strengths, grad_g, strict=True)
        ]
        return torch.cat(rows)

    def _grad_importances(self, g: Float[Tensor, "circuits pos C_total"]) -> Float[Tensor, "circuits pos C_total"]:
        """The gradient of the behaviour's losses in g."""
        config = self.config
        if config.variant == "importances_only":
            no_sources = g.new_zeros(*g.shape[:2], g.shape[2] + self.sites)
            return self.behaviour_gradient("importances", g, no_sources)
        stochastic, start = (uniform_sources(g, self.sites, self.generator) for _ in range(2))
        adversarial = attack(
            self.behaviour_gradient,
            g,
            start,
            self.reachable,
            steps=config.adversary_steps,
            step_size=config.adversary_step_size,
        )
        both = torch.cat([stochastic, adversarial])
        grad_g = self.behaviour_gradient("importances", torch.cat([g, g]), both)
        return torch.stack(grad_g.chunk(2)).mean(0)
