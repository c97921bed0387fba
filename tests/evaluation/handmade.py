"""A transformer whose mechanisms are known, and decompositions of it made by hand: a right one and each known way to be wrong.

One block: attention is 0, the MLP has a neuron a mechanism, with a negative bias, so that few are on at a token. The right
decomposition has one subcomponent a neuron in both matrices, important where the neuron is on: whatever is done to the others,
they stay below their threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.tiny import GAMMA, tiny_model
from tl_vpd import Decomposition, VPDConfig
from tl_vpd.training import new_decomposition

IN, OUT = "blocks.0.mlp.W_in", "blocks.0.mlp.W_out"
D_MODEL, NEURONS, VOCABULARY, KNOWN = 8, 16, 24, 16
"""Tokens from KNOWN on never occur in ``rows``."""
BIAS = -0.35

Gives = Callable[[Mapping[str, Tensor]], Tensor]


class HandGamma(nn.Module):
    """Γ as a function of the sites' inputs."""

    needs = "inputs"

    def __init__(self, gives: Gives) -> None:
        super().__init__()
        self.gives = gives

    def forward(self, inputs: Mapping[str, Tensor], token_mask: Tensor | None) -> Tensor:
        return self.gives(inputs)


def unit_rows(*shape: int, seed: int) -> Tensor:
    t = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return t / t.norm(dim=-1, keepdim=True)


def known_model() -> Any:
    model = tiny_model(
        torch.float32,
        n_layers=1,
        d_model=D_MODEL,
        d_mlp=NEURONS,
        d_vocab=VOCABULARY,
        act_fn="relu",
        normalization_type=None,
    )
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.embed.W_E.copy_(unit_rows(VOCABULARY, D_MODEL, seed=1))
        model.blocks[0].mlp.W_in.copy_(unit_rows(NEURONS, D_MODEL, seed=2).T)
        model.blocks[0].mlp.b_in.fill_(BIAS)
        model.blocks[0].mlp.W_out.copy_(6 * unit_rows(NEURONS, D_MODEL, seed=3))
        model.unembed.W_U.copy_(4 * unit_rows(VOCABULARY, D_MODEL, seed=4).T)
    return model


def rows(n: int = 16, length: int = 5, *, low: int = 0, high: int = KNOWN, seed: int = 0) -> Tensor:
    return torch.randint(low, high, (n, length), generator=torch.Generator().manual_seed(seed))


def one_token_rows(low: int, high: int, length: int = 3) -> Tensor:
    """A row a token, repeated."""
    return torch.arange(low, high)[:, None].expand(-1, length).contiguous()


def handmade(model: Any, V: Mapping[str, Tensor], U: Mapping[str, Tensor], gives: Gives) -> Decomposition:
    C = {name: U[name].shape[0] for name in (IN, OUT)}
    vpd = new_decomposition(model, VPDConfig(C=C, sites=(IN, OUT), gamma=GAMMA))
    with torch.no_grad():
        for name in (IN, OUT):
            vpd.V[name].copy_(V[name])
            vpd.U[name].copy_(U[name])
    vpd.gamma = HandGamma(gives)
    return vpd


def neurons_on(inputs: Mapping[str, Tensor], W: Tensor) -> Tensor:
    """1 where a neuron is on, ``[batch, pos, neuron]``."""
    return (inputs[IN] @ W + BIAS > 0).float()


def parts(model: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    mlp = model.blocks[0].mlp
    eye = torch.eye(NEURONS)
    return {IN: mlp.W_in.detach(), OUT: eye}, {IN: eye.clone(), OUT: mlp.W_out.detach()}


def right(model: Any) -> Decomposition:
    V, U = parts(model)
    return handmade(model, V, U, lambda inputs: neurons_on(inputs, V[IN]).repeat(1, 1, 2))


def with_importances(model: Any, change: Callable[[Tensor], Tensor]) -> Decomposition:
    """The right pieces with other importances."""
    V, U = parts(model)
    return handmade(model, V, U, lambda inputs: change(neurons_on(inputs, V[IN])).repeat(1, 1, 2))


def peeking(model: Any) -> Decomposition:
    """The right pieces, important only where their neuron makes the next token likelier."""
    V, U = parts(model)
    W_E, W_U = model.embed.W_E.detach(), model.unembed.W_U.detach()

    def gives(inputs: Mapping[str, Tensor]) -> Tensor:
        following = (inputs[IN] @ W_E.T).argmax(-1).roll(-1, dims=1)
        logits = (U[OUT] @ W_U).T[following]
        return (neurons_on(inputs, V[IN]) * (logits > 0)).repeat(1, 1, 2)

    return handmade(model, V, U, gives)


def delta_does_it(model: Any) -> Decomposition:
    """Pieces of a tenth of their length: nine tenths are Δ's."""
    V, U = parts(model)
    return handmade(model, V, {n: 0.1 * u for n, u in U.items()}, lambda x: neurons_on(x, V[IN]).repeat(1, 1, 2))


def with_opposed(model: Any, pairs: int, size: float) -> Decomposition:
    """The right pieces, and pairs X, −X in W_in that are never important; X is the same in all pairs."""
    V, U = parts(model)
    v = unit_rows(pairs, D_MODEL, seed=5).mean(0, keepdim=True).expand(pairs, -1)
    v = 3 * v / v.norm(dim=-1, keepdim=True)
    u = size * torch.ones(pairs, NEURONS)
    V[IN] = torch.cat([V[IN], v.T, v.T], dim=1)
    U[IN] = torch.cat([U[IN], u, -u])

    def gives(inputs: Mapping[str, Tensor]) -> Tensor:
        on = neurons_on(inputs, V[IN][:, :NEURONS])
        return torch.cat([on, on.new_zeros(*on.shape[:-1], 2 * pairs), on], dim=-1)

    return handmade(model, V, U, gives)


def lookup_table(model: Any) -> Decomposition:
    """A piece a token that does to this token what the whole weight does, important at the nearest known token alone."""
    mlp = model.blocks[0].mlp
    x = model.embed.W_E.detach()[:KNOWN]
    h = torch.relu(x @ mlp.W_in + mlp.b_in).detach()

    def table(t: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
        square = t.square().sum(-1, keepdim=True).clamp_min(1e-6)
        return (t / square).T, (t @ W).detach()

    V, U = zip(table(x, mlp.W_in), table(h, mlp.W_out), strict=True)

    def gives(inputs: Mapping[str, Tensor]) -> Tensor:
        nearest = (inputs[IN] @ x.T).argmax(-1)
        return nn.functional.one_hot(nearest, KNOWN).float().repeat(1, 1, 2)

    return handmade(model, dict(zip((IN, OUT), V, strict=True)), dict(zip((IN, OUT), U, strict=True)), gives)


def twinned_model(*, twin: bool) -> Any:
    """Token k is followed by k + 1 (mod 8), which neuron k sees to and, with ``twin``, neuron k + 8 as well: 12 nats each."""
    model, half = known_model(), torch.eye(D_MODEL)
    other = half if twin else torch.zeros_like(half)
    with torch.no_grad():
        mlp = model.blocks[0].mlp
        mlp.b_in.fill_(-0.5)
        mlp.W_in.copy_(torch.cat([half, other], dim=1))
        mlp.W_out.copy_(6 * torch.cat([half.roll(1, dims=1), other.roll(1, dims=1)]))
        model.embed.W_E.zero_()
        model.embed.W_E[:D_MODEL] = half
        model.unembed.W_U.zero_()
        model.unembed.W_U[:, :D_MODEL] = 4 * half
    return model


def first_half(model: Any) -> Decomposition:
    """Pieces by neuron, of which only those of the first 8 neurons are ever important, each at its token."""
    V, U = parts(model)
    first = torch.arange(NEURONS) < D_MODEL
    return handmade(model, V, U, lambda inputs: ((inputs[IN] @ V[IN] > 0.5) & first).float().repeat(1, 1, 2))
