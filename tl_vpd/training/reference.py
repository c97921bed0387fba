"""The whole method on one page: a training step of VPD, every tensor formed, every equation as the papers write it.

A weight W of the target is the sum of rank-one subcomponents ``V[:, c] ⊗ U[c, :]`` and of the rest Δ = W − V U. A network Γ reads
the target's activations and predicts how important each subcomponent is at each token, g in [0, 1]. Training makes every mask
between g and 1, and any mask on Δ, leave the output unchanged, while as few g as possible are above 0.

Titles in quotes are sections of the VPD paper (*Interpreting Language Model Parameters*); *later* is the authors' newer code.
Before the first step, V and U learn section D alone. Speed, memory, precision and processes: ``tl_vpd.training.engine``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tl_vpd.training.config import VPDConfig
from tl_vpd.training.schedules import Schedule

BySite = Mapping[str, Tensor]


@dataclass
class Site:
    """A decomposed weight ``y = x W + b``, its subcomponents, and the adversary's sources; V, U and r require gradients."""

    W: Tensor  # [d_in d_out]
    b: Tensor  # [d_out]
    V: Tensor  # [d_in C]
    U: Tensor  # [C d_out]
    r: Tensor  # [batch slots C+1], uniform in [0, 1] at the start; Δ's source is the last
    first: Tensor | float = 0.0  # Adam's moments of r
    second: Tensor | float = 0.0

    def clean(self, x: Tensor) -> Tensor:
        return x @ self.W + self.b

    def masked(self, x: Tensor, g: Tensor, r: Tensor) -> Tensor:  # "Reconstruction losses"
        m, m_delta = g + (1 - g) * r[..., :-1], r[..., -1:]
        return ((x @ self.V) * m) @ self.U + m_delta * (x @ (self.W - self.V @ self.U)) + self.b


@dataclass
class Samples:
    """What a step draws: tensors with one row for each row of the batch that the loss uses."""

    stochastic: BySite  # [batch pos C+1], uniform in [0, 1]
    slots: Tensor  # [batch pos], which source r a token uses: that of its position; later a random one of a pool
    stochastic_routing: BySite | None = None  # [batch pos], True where the site is masked (None: everywhere)
    adversarial_routing: BySite | None = None
    layerwise: BySite | None = None  # [batch pos C+1], uniform in [0, 1]


class Reference:
    """V, U, Γ and the adversary in training. ``target(tokens, real, site)`` computes decomposed products as ``site(name, x)`` and
    returns the output; ``gamma(inputs by site, real)`` returns z ``[batch pos ΣC]``."""

    def __init__(self, config: VPDConfig, target: Callable[..., Tensor], sites: Mapping[str, Site], gamma: nn.Module):
        self.config, self.target, self.sites, self.gamma = config, target, sites, gamma
        self.matrices = [matrix for site in sites.values() for matrix in (site.V, site.U)]
        groups = [{"params": p} for p in (self.matrices, list(gamma.parameters()))]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        self.steps, self.ascents, self.mean_frequency = 0, 0, torch.zeros(())

    def step(self, tokens: Tensor, real: Tensor, samples: Samples) -> dict[str, Tensor]:
        """One update of V, U, Γ and the adversary; returns the losses before it. ``real [batch pos]`` is False at padding."""
        config, c, now, sites = self.config, self.config.coefficients, Schedule.at(self.steps, self.config), self.sites
        attacked, sampled = (slice(0, None, 2), slice(1, None, 2)) if config.merged else (slice(None), slice(None))

        # A. Clean forward: the target's output, and every site's input.
        inputs: dict[str, Tensor] = {}
        with torch.no_grad():
            clean = self.target(tokens, real, lambda name, x: sites[name].clean(inputs.setdefault(name, x)))

        # B. Importances g = clamp(z, 0, 1). Their gradient, summed over losses, passes where 0 < z ≤ 1; below, a hundredth
        #    of it, and only where descent would raise z. "Causal Importance Function Architecture"
        z = self.gamma(inputs, real)
        importances = z.detach().clamp(0, 1) + (z - z.detach())
        importances.register_hook(lambda d: torch.where(z > 1, 0, torch.where(z > 0, d, 0.01 * d.clamp(max=0))))
        g = dict(zip(sites, importances.split([site.V.shape[1] for site in sites.values()], dim=-1), strict=True))

        def reconstruction(rows: slice, r: BySite, routing: BySite | None = None) -> Tensor:
            def masked(name: str, x: Tensor) -> Tensor:
                if name not in r:
                    return sites[name].clean(x)
                y = sites[name].masked(x, g[name][rows], r[name])
                return y if routing is None else torch.where(routing[name][..., None], y, sites[name].clean(x))

            output = self.target(tokens[rows], real[rows], masked)
            log_p, log_q = clean[rows].log_softmax(-1), output.log_softmax(-1)
            kl, mse = (log_p.exp() * (log_p - log_q)).sum(-1), (output - clean[rows]).square().mean(-1)
            return (kl if config.output == "kl" else mse)[real[rows]].mean()

        def adversarial() -> Tensor:
            r = {name: site.r.take_along_dim(samples.slots[..., None], dim=1) for name, site in sites.items()}
            return reconstruction(attacked, r, samples.adversarial_routing)

        # C. The adversary's first ascents: sources that raise the loss. "Reconstruction losses"
        for _ in range(config.adversary.inner_steps):
            self.ascend(torch.autograd.grad(adversarial(), [s.r for s in sites.values()]), now.adversary_lr)

        # D. Faithfulness: V U must be W. "Δ-L2 penalty"; later each site relative to its norm.
        total, relative = sum(s.W.numel() for s in sites.values()), config.faithfulness.kind == "relative"
        sizes = {name: len(sites) * s.W.square().sum() if relative else total for name, s in sites.items()}
        errors = [(s.W - s.V @ s.U).square().sum() / sizes[name] for name, s in sites.items()]
        losses = {"faithfulness": torch.stack(errors).sum()}

        # E. Minimality: few g above 0, each at few tokens. "Optimizing for minimality", "Optimizing for simplicity"; later
        #    smooth L0 instead of g^p, a fixed count a, and the frequency loss and its slope at a running mean of f.
        how, upper = config.minimality, torch.where(z > 1, 1 + 0.01 * (z - 1), z.clamp(0, 1))[real]
        phi = (upper + 1e-12) ** now.p if how.kind == "power" else upper**2 / (upper**2 + now.smooth**2)
        f, beta = phi.mean(0), 0.5 ** (1 / how.frequency_half_life) if how.frequency_half_life else 0.0
        losses["importance"] = f.sum()
        self.mean_frequency = beta * self.mean_frequency + (1 - beta) * f.detach()
        f = self.mean_frequency / (1 - beta ** (self.steps + 1)) + (f - f.detach())
        losses["frequency"] = (f * torch.log2(1 + (how.frequency_reference or real.sum()) * f)).sum()

        # F. Stochastic reconstruction; layerwise, one site at a time (SPD). Merged, later: on odd rows, C and G on even ones.
        losses["stochastic"] = reconstruction(sampled, samples.stochastic, samples.stochastic_routing)
        alone = [reconstruction(slice(None), {name: r}) for name, r in (samples.layerwise or {}).items()]
        losses["layerwise"] = torch.stack(alone).mean() if alone else torch.zeros(())

        # G. Adversarial reconstruction.
        losses["adversarial"] = adversarial()

        # H. One backward; the gradient of V and U is clipped, Γ's is not; AdamW. "Summary of loss terms"
        minimal = now.minimality * (c.importance * losses["importance"] + c.frequency * losses["frequency"])
        masked = sum(getattr(c, name) * losses[name] for name in ("stochastic", "layerwise", "adversarial"))
        losses["total"] = c.delta * losses["faithfulness"] + minimal + masked
        self.optimizer.zero_grad()
        losses["total"].backward()
        nn.utils.clip_grad_norm_(self.matrices, config.optimizer.clip or torch.inf)
        rates = config.optimizer.lr, config.optimizer.gamma_lr or config.optimizer.lr
        for group, lr in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = lr * now.rate
        self.optimizer.step()

        # I. The adversary's last ascent, along its gradient in that backward.
        self.ascend([s.r.grad / c.adversarial for s in sites.values()], now.adversary_lr)  # type: ignore
        self.steps += 1
        return losses

    @torch.no_grad()
    def ascend(self, gradients: Sequence[Tensor], lr: float) -> None:
        self.ascents += 1
        (beta1, beta2), eps = self.config.adversary.betas, self.config.adversary.eps
        for site, d in zip(self.sites.values(), gradients, strict=True):
            site.first, site.second = beta1 * site.first + (1 - beta1) * d, beta2 * site.second + (1 - beta2) * d**2
            first, second = site.first / (1 - beta1**self.ascents), site.second / (1 - beta2**self.ascents)
            site.r = (site.r + lr * first / (second.sqrt() + eps)).clamp(0, 1).requires_grad_()
