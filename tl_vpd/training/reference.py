"""The whole method on one page: a training step of VPD, every tensor formed, every equation as the papers write it.

A weight W of the target is the sum of rank-one subcomponents ``V[:, c] ⊗ U[c, :]`` and of the rest Δ = W − V U. A network Γ reads
the target's activations and predicts how important each subcomponent is at each token, g in [0, 1]. Training makes every mask
between g and 1, and any mask on Δ, leave the output unchanged, while as few g as possible are above 0.
Titles in quotes are sections of the VPD paper (*Interpreting Language Model Parameters*); *later* is the authors' newer code.
Before the first step, V and U learn section D's faithfulness alone. The fast forms: ``tl_vpd.training.engine``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tl_vpd.training.config import VPDConfig
from tl_vpd.training.schedules import Schedule


@dataclass
class Site:
    """A decomposed weight ``y = x W + b``, its subcomponents, and the adversary's sources; V, U and r require gradients."""

    W: Tensor  # [d_in d_out]
    b: Tensor  # [d_out]
    V: Tensor  # [d_in C]
    U: Tensor  # [C d_out]
    r: Tensor  # [batch slots C+1], uniform in [0, 1] at the start; Δ's source is the last
    units: int = 0  # heads or neurons that y consists of (0: neither)
    moments: tuple[Tensor | float, Tensor | float] = (0.0, 0.0)  # Adam's, of r

    def clean(self, x: Tensor) -> Tensor:
        return x @ self.W + self.b

    def masked(self, x: Tensor, g: Tensor, r: Tensor) -> Tensor:  # "Reconstruction losses"
        m, m_delta = g + (1 - g) * r[..., :-1], r[..., -1:]
        return ((x @ self.V) * m) @ self.U + m_delta * (x @ (self.W - self.V @ self.U)) + self.b


@dataclass
class Samples:  # what a step draws: tensors with one row for each row of the batch that the loss uses
    rows: Sequence[Sequence[int]]  # with adversarial, and with stochastic masks: all; later a proportion, and the rest
    stochastic: dict[str, Tensor]  # [batch pos C+1], uniform in [0, 1]
    slots: Tensor  # [batch pos], which source r a token uses: that of its position; later a random one of a pool
    stochastic_routing: Mapping[str, Tensor] | None = (
        None  # [batch pos], True where the site is masked (None: everywhere)
    )
    adversarial_routing: Mapping[str, Tensor] | None = None
    layerwise: dict[str, Tensor] | None = None  # [batch pos C+1], uniform in [0, 1]


class Reference:
    """V, U, Γ, adversary. ``target(tokens, real, site)`` has products as ``site(name, x)``; ``gamma(inputs, real)`` gives z."""

    def __init__(self, config: VPDConfig, target: Callable[..., Tensor], sites: Mapping[str, Site], gamma: nn.Module):
        self.config, self.target, self.sites, self.gamma, how = config, target, sites, gamma, config.optimizer
        self.matrices = [matrix for site in sites.values() for matrix in (site.V, site.U)]
        self.steps, self.ascents, self.mean_frequency = 0, 0, torch.zeros(())
        two, one = ([p for p in gamma.parameters() if (p.ndim == 2) == is_matrix] for is_matrix in (True, False))
        make: Any = {"adamw": torch.optim.AdamW, "muon": torch.optim.Muon}
        more = {"weight_decay": 0.0, "momentum": how.momentum, "adjust_lr_fn": "match_rms_adamw"}
        groups = (how.kind, self.matrices, how.lr), (how.kind, two, how.gamma_lr), ("adamw", one, how.gamma_lr)
        self.optimizers = [make[kind]([{"params": p, "peak": lr or how.lr, **more}]) for kind, p, lr in groups]

    def step(self, tokens: Tensor, real: Tensor, samples: Samples) -> dict[str, Tensor]:
        """One update of V, U, Γ and the adversary; returns the losses before it. ``real [batch pos]`` is False at padding."""
        config, now, sites, zero = self.config, Schedule.at(self.steps, self.config), self.sites, torch.zeros(())
        c = now.coefficients

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

        def reconstruction(
            rows: Sequence[int], r: dict[str, Tensor], routing: Mapping[str, Tensor] | None = None
        ) -> Tensor:
            def masked(name: str, x: Tensor) -> Tensor:
                y = sites[name].masked(x, g[name][rows], r[name]) if name in r else sites[name].clean(x)
                return y if routing is None else torch.where(routing[name][..., None], y, sites[name].clean(x))

            output = self.target(tokens[rows], real[rows], masked)
            log_p, log_q = clean[rows].log_softmax(-1), output.log_softmax(-1)
            kl, mse = (log_p.exp() * (log_p - log_q)).sum(-1), (output - clean[rows]).square().mean(-1)
            return (kl if config.output == "kl" else mse)[real[rows]].mean()

        def adversarial() -> Tensor:
            r = {name: site.r.take_along_dim(samples.slots[..., None], dim=1) for name, site in sites.items()}
            return reconstruction(samples.rows[0], r, samples.adversarial_routing)

        # C. The adversary's first ascents, from its start on: sources that raise the loss. "Reconstruction losses"
        for _ in range(config.adversary.inner_steps if c.adversarial else 0):
            self.ascend(torch.autograd.grad(adversarial(), [s.r for s in sites.values()]), now.adversary_lr)

        # D. Faithfulness: V U must be W. "Δ-L2 penalty"; later relative. Locality, later: few heads or neurons in each U[c].
        total, relative = sum(s.W.numel() for s in sites.values()), config.faithfulness.kind == "relative"
        sizes = [len(sites) * s.W.square().sum() if relative else total for s in sites.values()]
        errors = [(s.W - s.V @ s.U).square().sum() / size for s, size in zip(sites.values(), sizes, strict=True)]
        squares = [s.U.square().unflatten(1, (s.units, -1)).sum(-1) for s in sites.values() if s.units]
        used = [(f / (f + f.sum(1, keepdim=True) * now.locality / f.shape[1])).sum(1) for f in squares]
        losses = {"faithfulness": torch.stack(errors).sum(), "locality": torch.cat(used).mean() if used else zero}

        # E. Minimality: few g above 0, each at few tokens. "Optimizing for minimality", "Optimizing for simplicity"; later
        #    smooth L0 instead of g^p (1 at g = 1), a fixed count a, the frequency loss and its slope at a running mean of f.
        how, upper = config.minimality, torch.where(z > 1, 1 + 0.01 * (z - 1), z.clamp(0, 1))[real]
        phi = (upper + 1e-12) ** now.p if how.kind == "power" else upper**2 / (upper**2 + now.smooth**2)
        f = (phi * (1 + now.smooth**2) if how.normalised else phi).mean(0)
        beta = 0.5 ** (1 / how.frequency_half_life) if how.frequency_half_life else 0.0
        losses["importance"] = f.sum()
        self.mean_frequency = beta * self.mean_frequency + (1 - beta) * f.detach()
        f = self.mean_frequency / (1 - beta ** (self.steps + 1)) + (f - f.detach())
        losses["frequency"] = (f * torch.log2(1 + (how.frequency_reference or real.sum()) * f)).sum()

        # F, G. Stochastic reconstruction; layerwise, one site at a time (SPD); adversarial. Merged, later: F and G on other rows.
        losses["stochastic"] = reconstruction(samples.rows[1], samples.stochastic, samples.stochastic_routing)
        alone = [reconstruction(range(len(tokens)), {name: r}) for name, r in (samples.layerwise or {}).items()]
        losses["layerwise"] = torch.stack(alone).mean() if alone else zero
        losses["adversarial"] = adversarial() if c.adversarial else zero

        # H. One backward; the gradient of V and U is clipped, later Γ's too; AdamW, later Muon. "Summary of loss terms"
        weights = c.model_dump() | {"faithfulness": c.delta}
        losses["total"] = torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()
        losses["total"].backward()
        nn.utils.clip_grad_norm_(self.matrices, config.optimizer.clip or torch.inf)
        nn.utils.clip_grad_norm_(self.gamma.parameters(), config.optimizer.gamma_clip or torch.inf)
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["peak"] * now.rate
            optimizer.step()
            optimizer.zero_grad()

        # I. The adversary's last ascent, along its gradient in that backward.
        if c.adversarial:
            self.ascend([s.r.grad / c.adversarial for s in sites.values()], now.adversary_lr)  # type: ignore
        self.steps += 1
        return losses

    @torch.no_grad()
    def ascend(self, gradients: Sequence[Tensor], lr: float) -> None:
        self.ascents += 1
        (beta1, beta2), eps = self.config.adversary.betas, self.config.adversary.eps
        for site, d in zip(self.sites.values(), gradients, strict=True):
            site.moments = beta1 * site.moments[0] + (1 - beta1) * d, beta2 * site.moments[1] + (1 - beta2) * d**2
            first, second = site.moments[0] / (1 - beta1**self.ascents), site.moments[1] / (1 - beta2**self.ascents)
            site.r = (site.r + lr * first / (second.sqrt() + eps)).clamp(0, 1).requires_grad_()
