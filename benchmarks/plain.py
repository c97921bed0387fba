"""A plain implementation of the same training step, to compare with: everything formed, everything stored.

One small transformer with its weights as a dictionary; at every masked site Δ = W − V U is formed, masks are tensors of their
own, ``(x V ⊙ m) U + m_Δ x Δ`` is computed as written, routing computes ``x W`` as well, every pass is separate, the adversary's
last gradient comes from a backward of its own, and two optimizers loop over their tensors. The losses, the adversary and the
update are those of the paper (``tl_vpd.training``), so that both do the same work on the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Weights = dict[str, Tensor]


class SquashLower(torch.autograd.Function):
    """``clamp(z, 0, 1)``, with a slope of 0.01 at and below 0 where it raises z."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (z,) = ctx.saved_tensors
        low = torch.where((z <= 0) & (grad < 0), 0.01 * grad, torch.zeros_like(grad))
        return torch.where((z > 0) & (z <= 1), grad, low)


def squash_upper(z: Tensor) -> Tensor:
    """``clamp(z, 0, 1)`` with a slope of 0.01 above 1."""
    return torch.where(z > 1, 1 + 0.01 * (z - 1), z.clamp(0, 1))


def rotate(x: Tensor) -> Tensor:
    """Rotary embedding, half-split, over ``[batch, head, pos, d_head]``."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2])[:, None] / 10_000 ** (torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1)


def rms(x: Tensor) -> Tensor:
    """RMSNorm without a scale."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool) -> Tensor:
    """Attention over ``[batch, pos, width]``."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    scores = rotate(q) @ rotate(k).transpose(-1, -2) / math.sqrt(q.shape[-1])
    if causal:
        n = scores.shape[-1]
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)


class Target:
    """The model that is decomposed: pre-norm, rotary, GELU; every site's product goes through ``site``."""

    def __init__(self, layers: int, d: int, d_mlp: int, heads: int, vocabulary: int, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        shapes = {"attn.W_Q": (d, d), "attn.W_K": (d, d), "attn.W_V": (d, d), "attn.W_O": (d, d)}
        shapes |= {"mlp.W_in": (d, d_mlp), "mlp.W_out": (d_mlp, d)}
        self.layers, self.heads = layers, heads
        self.W = {
            f"blocks.{i}.{n}": torch.randn(s, generator=g) / math.sqrt(s[0])
            for i in range(layers)
            for n, s in shapes.items()
        }
        self.b = {n: torch.zeros(w.shape[1]) for n, w in self.W.items()}
        self.embed = torch.randn(vocabulary, d, generator=g)
        self.unembed = torch.randn(d, vocabulary, generator=g) / math.sqrt(d)

    def __call__(self, tokens: Tensor, site: Any) -> Tensor:
        """Logits."""
        x = self.embed[tokens]
        for i in range(self.layers):
            h, name = rms(x), f"blocks.{i}."
            q, k, v = (site(f"{name}attn.W_{c}", h) for c in "QKV")
            x = x + site(name + "attn.W_O", attend(q, k, v, self.heads, causal=True))
            x = x + site(name + "mlp.W_out", F.gelu(site(name + "mlp.W_in", rms(x))))
        return rms(x) @ self.unembed


class Gamma(nn.Module):
    """The shared transformer over all sites' inputs."""

    def __init__(self, d_in: int, C: int, d: int, d_mlp: int, blocks: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.embed, self.unembed = nn.Linear(d_in, d), nn.Linear(d, C)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    **{n: nn.Linear(d, d, bias=False) for n in "qkvo"},
                    "up": nn.Linear(d, d_mlp),
                    "down": nn.Linear(d_mlp, d),
                }
            )
            for _ in range(blocks)
        )

    def forward(self, inputs: list[Tensor]) -> Tensor:
        """Pre-sigmoid values ``[batch, pos, C]``."""
        x = self.embed(torch.cat([rms(i) for i in inputs], dim=-1))
        for b in self.blocks:
            h = rms(x)
            x = x + b["o"](attend(b["q"](h), b["k"](h), b["v"](h), self.heads, causal=False))  # type: ignore[index]
            x = x + b["down"](F.gelu(b["up"](rms(x))))  # type: ignore[index]
        return self.unembed(x)


class PlainTrainer:
    """Training steps as one would first write them."""

    def __init__(
        self, target: Target, counts: Mapping[str, int], gamma: Gamma, shape: tuple[int, int], steps: int
    ) -> None:
        g = torch.Generator().manual_seed(1)
        self.target, self.counts, self.gamma, self.steps, self.done = target, dict(counts), gamma, steps, 0
        self.V = {n: nn.Parameter(torch.randn(target.W[n].shape[0], c, generator=g) / 8) for n, c in counts.items()}
        self.U = {
            n: nn.Parameter(torch.randn(c, target.W[n].shape[1], generator=g) / c**0.5) for n, c in counts.items()
        }
        self.parts = [*self.V.values(), *self.U.values()]
        self.optimizers = [torch.optim.AdamW(p, lr=5e-4, weight_decay=0.0) for p in (self.parts, gamma.parameters())]
        self.sources = {n: nn.Parameter(torch.rand(*shape, c + 1, generator=g)) for n, c in counts.items()}
        self.adam = torch.optim.Adam(self.sources.values(), lr=0.01, betas=(0.5, 0.99), maximize=True)

    def step(self, tokens: Tensor) -> float:
        """One update of V, U, Γ and the adversary's sources."""
        inputs: Weights = {}
        with torch.no_grad():
            logits = self.target(tokens, lambda n, x: self._note(inputs, n, x))
        z = self.gamma([inputs[n] for n in self.counts])
        g = dict(zip(self.counts, SquashLower.apply(z).split(list(self.counts.values()), dim=-1), strict=True))
        p = 2.0 - 1.6 * self.done / self.steps
        for _ in range(2):
            self._ascend(tokens, logits, g)
        adversarial = self._loss(tokens, logits, g, self.sources, None)
        drawn = {n: torch.rand_like(s) for n, s in self.sources.items()}
        stochastic = self._loss(tokens, logits, g, drawn, self._routing(tokens))
        s = (squash_upper(z) + 1e-12).pow(p).sum((0, 1))
        minimality = 2e-4 * s.sum() + 1e-4 * (s * (1 + s).log2()).sum()
        delta = sum(((self.target.W[n] - self.V[n] @ self.U[n]).square().sum() for n in self.counts), torch.zeros(()))
        delta = delta / sum(self.target.W[n].numel() for n in self.counts)
        loss = 0.5 * adversarial + 0.5 * stochastic + minimality / tokens.numel() + 1e7 * delta
        gradient = torch.autograd.grad(adversarial, list(self.sources.values()), retain_graph=True)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        for source in self.sources.values():
            source.requires_grad_(False)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parts, 0.01)
        for optimizer in self.optimizers:
            optimizer.step()
        for source, own in zip(self.sources.values(), gradient, strict=True):
            source.requires_grad_(True)
            source.grad = own
        self._clamped()
        self.done += 1
        return float(loss.detach())

    def _note(self, inputs: Weights, name: str, x: Tensor) -> Tensor:
        inputs[name] = x
        return x @ self.target.W[name] + self.target.b[name]

    def _ascend(self, tokens: Tensor, logits: Tensor, g: Weights) -> None:
        constant = {n: t.detach() for n, t in g.items()}
        loss = self._loss(tokens, logits, constant, self.sources, None, constant_weights=True)
        for source, own in zip(
            self.sources.values(), torch.autograd.grad(loss, list(self.sources.values())), strict=True
        ):
            source.grad = own
        self._clamped()

    def _clamped(self) -> None:
        self.adam.step()
        with torch.no_grad():
            for source in self.sources.values():
                source.clamp_(0, 1)

    def _routing(self, tokens: Tensor) -> Weights:
        n = len(self.counts)
        k = torch.randint(1, n + 1, tokens.shape)
        rank = torch.rand(*tokens.shape, n).argsort(-1).argsort(-1)
        return {name: rank[..., i] < k for i, name in enumerate(self.counts)}

    def _loss(
        self,
        tokens: Tensor,
        logits: Tensor,
        g: Weights,
        sources: Mapping[str, Tensor],
        routing: Weights | None,
        constant_weights: bool = False,
    ) -> Tensor:
        def site(name: str, x: Tensor) -> Tensor:
            V, U, W = self.V[name], self.U[name], self.target.W[name]
            if constant_weights:
                V, U = V.detach(), U.detach()
            r = sources[name]
            mask = g[name] + (1 - g[name]) * r[..., :-1]
            out = ((x @ V) * mask) @ U + r[..., -1:] * (x @ (W - V @ U))
            if routing is not None:
                out = torch.where(routing[name][..., None], out, x @ W)
            return out + self.target.b[name]

        masked = self.target(tokens, site)
        return F.kl_div(
            masked.flatten(0, 1).log_softmax(-1),
            logits.flatten(0, 1).log_softmax(-1),
            reduction="batchmean",
            log_target=True,
        )
