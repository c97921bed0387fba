"""The targeted step on one page, every tensor formed (arXiv 2607.13047); sections as in ``tl_vpd.training.reference``.

Two batches: of the *target*, which is to come from subcomponents alone, and of ordinary *non-target* data, where Δ is always on
and subcomponents should be off: what the model does elsewhere stays in Δ, which has no loss. AdamW, one source per position; what
plain training can do beside that is on the other page.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from tl_vpd.training.reference import Site
from tl_vpd.training.schedules import Schedule
from tl_vpd.training.targeted.config import TargetedCoefficients, TargetedConfig


@dataclass
class Batch:
    """Rows of one stream, and what a step draws for them."""

    tokens: Tensor  # [batch pos]
    real: Tensor  # [batch pos], False at padding
    r: Mapping[str, Tensor]  # [batch pos C+1], uniform in [0, 1]; the last is Δ's
    routing: Mapping[str, Tensor] | None = None  # [batch pos], True where the site is masked (None: everywhere)


@dataclass
class Clean:
    """A batch after its clean forward and Γ."""

    output: Tensor  # [batch pos vocab]
    z: Tensor  # [batch pos ΣC]
    g: dict[str, Tensor]  # [batch pos C]


class TargetedReference:
    """V, U, Γ and the adversary in training; arguments as for ``Reference``. A site's sources are for the longest rows."""

    def __init__(
        self, config: TargetedConfig, target: Callable[..., Tensor], sites: Mapping[str, Site], gamma: nn.Module
    ):
        self.config, self.target, self.sites, self.gamma = config, target, sites, gamma
        self.matrices = [matrix for site in sites.values() for matrix in (site.V, site.U)]
        how, two = config.optimizer, (self.matrices, list(gamma.parameters()))
        groups = [{"params": p, "peak": lr} for p, lr in zip(two, (how.lr, how.gamma_lr or how.lr), strict=True)]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        self.steps, self.ascents, self.moments = 0, 0, dict[str, tuple[Tensor, Tensor]]()

    def step(self, batch: Batch, other: Batch) -> dict[str, Tensor]:
        """One update of V, U, Γ and the adversary from a target and a non-target batch; returns the losses before it."""
        config, now, pos = self.config, Schedule.at(self.steps, self.config), batch.tokens.shape[1]
        c, zero, losses = cast(TargetedCoefficients, now.coefficients), torch.zeros(()), dict[str, Tensor]()
        sources = {name: site.r for name, site in self.sites.items()}

        def adversarial() -> Tensor:
            return self.distance(batch, here, {name: r[:, :pos] for name, r in sources.items()})

        # A, B. Clean forward and importances of both batches.
        here, there = self.clean(batch), self.clean(other)

        # C. The adversary's first ascents, from its start on, on the target alone; sources of further positions rest.
        for _ in range(config.adversary.inner_steps if c.adversarial else 0):
            self.ascend(torch.autograd.grad(adversarial(), list(sources.values())), pos, now.adversary_lr)
            sources = {name: site.r for name, site in self.sites.items()}

        # D. None: Δ is the catch-all.

        # E. Minimality: importance and frequency on the target, importance elsewhere at twice the coefficient.
        f = self.penalty(batch, here, now.p)
        count = config.minimality.frequency_reference or batch.real.sum()
        losses["importance"], losses["frequency"] = f.sum(), (f * torch.log2(1 + count * f)).sum()
        losses["nontarget_importance"] = self.penalty(other, there, now.p).sum()

        # F, G. Target: stochastic, adversarial, and unmasked (all masks 1, Δ 0).
        losses["stochastic"] = self.distance(batch, here, batch.r, batch.routing)
        losses["adversarial"] = adversarial() if c.adversarial else zero
        ones = {name: torch.cat([torch.ones_like(r[..., :-1]), 0 * r[..., -1:]], dim=-1) for name, r in batch.r.items()}
        losses["unmasked"] = self.distance(batch, here, ones) if c.unmasked else zero

        #    Non-target: masks between the importance there and 1, and every Δ's mask 1.
        r_there = {name: torch.cat([r[..., :-1], torch.ones_like(r[..., -1:])], dim=-1) for name, r in other.r.items()}
        losses["nontarget"] = self.distance(other, there, r_there, other.routing)

        # H. One backward; the gradient of V and U is clipped; AdamW.
        weights = c.model_dump() | {"nontarget_importance": c.nontarget_importance * c.importance}
        losses["total"] = torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()
        losses["total"].backward()
        nn.utils.clip_grad_norm_(self.matrices, config.optimizer.clip or torch.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * now.rate
        self.optimizer.step()
        self.optimizer.zero_grad()

        #    Then decay of what is important nowhere in both batches: V's column and U's row.
        with torch.no_grad():
            for name, site in self.sites.items():
                largest = torch.maximum(here.g[name][batch.real].amax(0), there.g[name][other.real].amax(0))
                factor = 1 - config.optimizer.lr * now.rate * config.decay * (1 - largest)
                site.V *= factor
                site.U *= factor[:, None]

        # I. The adversary's last ascent, along its gradient in that backward.
        if c.adversarial:
            self.ascend([cast(Tensor, r.grad) / c.adversarial for r in sources.values()], pos, now.adversary_lr)
        self.steps += 1
        return losses

    def clean(self, batch: Batch) -> Clean:
        """Output and importances; the gradients of z as on the other page."""
        inputs: dict[str, Tensor] = {}
        with torch.no_grad():
            output = self.target(batch.tokens, batch.real, lambda n, x: self.sites[n].clean(inputs.setdefault(n, x)))
        z = self.gamma(inputs, batch.real)
        importances = z.detach().clamp(0, 1) + (z - z.detach())
        importances.register_hook(lambda d: torch.where(z > 1, 0, torch.where(z > 0, d, 0.01 * d.clamp(max=0))))
        by_site = importances.split([site.V.shape[1] for site in self.sites.values()], dim=-1)
        return Clean(output, z, dict(zip(self.sites, by_site, strict=True)))

    def distance(
        self, batch: Batch, clean: Clean, r: Mapping[str, Tensor], routing: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Reconstruction under the masks of sources r, ``g + (1 − g) r``."""

        def masked(name: str, x: Tensor) -> Tensor:
            y = self.sites[name].masked(x, clean.g[name], r[name])
            return y if routing is None else torch.where(routing[name][..., None], y, self.sites[name].clean(x))

        log_p = clean.output.log_softmax(-1)
        log_q = self.target(batch.tokens, batch.real, masked).log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)[batch.real].mean()

    def penalty(self, batch: Batch, clean: Clean, p: float) -> Tensor:
        """The mean over tokens of ``(g_upper + ε)^p`` by subcomponent."""
        upper = torch.where(clean.z > 1, 1 + 0.01 * (clean.z - 1), clean.z.clamp(0, 1))[batch.real]
        return ((upper + 1e-12) ** p).mean(0)

    @torch.no_grad()
    def ascend(self, gradients: list[Tensor] | tuple[Tensor, ...], pos: int, lr: float) -> None:
        """One ascent of Adam, of the sources of the first ``pos`` positions."""
        self.ascents += 1
        (beta1, beta2), eps = self.config.adversary.betas, self.config.adversary.eps
        for (name, site), gradient in zip(self.sites.items(), gradients, strict=True):
            r, d = site.r.detach().clone(), gradient[:, :pos]
            first, second = self.moments.setdefault(name, (torch.zeros_like(r), torch.zeros_like(r)))
            first[:, :pos] = beta1 * first[:, :pos] + (1 - beta1) * d
            second[:, :pos] = beta2 * second[:, :pos] + (1 - beta2) * d**2
            step = first / (1 - beta1**self.ascents) / ((second / (1 - beta2**self.ascents)).sqrt() + eps)
            r[:, :pos] = (r + lr * step)[:, :pos].clamp(0, 1)
            site.r = r.requires_grad_()
