"""A masked pass whose importances and sources are tensors of autograd's graph, for recording and compiling.

    m = g + (1 − g) r,      y = b + m_Δ (y₀ − b) + (a ⊙ (m − m_Δ)) @ U,      a = x @ V

The same products as ``BlockedMasks``'s, written as plain operations without blocks, buffers or data-dependent shapes: masks would
fill memory if these ran as they stand, but a compiler makes them inside the loops that use them. Routed tokens alone are
computed: they are gathered in a fixed number of slots, more than are expected to be routed, and what is left over is thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable


class Slots(NamedTuple):
    """Where a site's routed tokens are computed. Slots left over hold tokens that are not routed, each at most once.

    ``token``: of each slot. ``slot``: of each token (any, where it is not routed). ``routed``: by token.
    """

    token: Int[Tensor, " slots"]
    slot: Int[Tensor, " tokens"]
    routed: Bool[Tensor, " tokens"]

    def gathered(self, by_token: Float[Tensor, "tokens d"]) -> Float[Tensor, "slots d"]:
        """The rows that slots hold."""
        found: Tensor = _LookedUp.apply(by_token, self.token, self.gradient)
        return found

    def spread(self, by_slot: Float[Tensor, "slots d"]) -> Float[Tensor, "tokens d"]:
        """Rows of slots back at their tokens, any at those that are not routed: nothing may come of them."""
        found: Tensor = _LookedUp.apply(by_slot, self.slot, lambda grad: grad[self.token])
        return found

    def gradient(self, by_slot: Float[Tensor, "slots d"]) -> Float[Tensor, "tokens d"]:
        """Rows of slots back at their tokens, 0 at those that are not routed."""
        return torch.where(self.routed[:, None], by_slot[self.slot], 0)


def slots(routing: Bool[Tensor, "site tokens"], n: int) -> Slots | None:
    """Slots of sites, in tensors with sites first; None if one has more than n routed tokens."""
    counts = routing.sum(1)
    if int(counts.max()) > n:
        return None
    token = (~routing).byte().argsort(dim=1, stable=True)[:, :n]
    slot = (routing.cumsum(1) - 1).clamp_(min=0)
    return Slots(token.contiguous(), slot, routing)


class _LookedUp(torch.autograd.Function):
    """``rows[at]``. As no token has two slots, ``back`` looks the gradient up as well, and nothing is added up."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, at: Tensor, back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.back = back
        return rows[at]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.back(grad), None, None


class TraceableMasks:
    """Importances, sources, Δ's sources and routing of one masked pass by site, tokens on the first axis.

    Args:
        g, sources, delta: by masked site, of slots where the pass is routed; gradients reach them. batch: the shape that tokens
            have in the model.
        slots: by site, where the masked path is taken (None: everywhere); elsewhere a site's output is the model's own.
    """

    def __init__(
        self,
        g: Mapping[str, Float[Tensor, "rows _"]],
        sources: Mapping[str, Float[Tensor, "rows _"]],
        delta: Mapping[str, Float[Tensor, "rows 1"]],
        batch: torch.Size,
        slots: Mapping[str, Slots] | None = None,
    ) -> None:
        self.g, self.sources, self.delta, self.batch, self.slots = g, sources, delta, batch, slots
        self.routing = None if slots is None else {name: at.routed.view(batch) for name, at in slots.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.g

    def mask(self, name: str) -> tuple[Float[Tensor, "*batch C"], Float[Tensor, "*batch"]]:
        """One site's mask and Δ's; of tokens that are not routed, any."""
        mask, delta = self._mask(name), self.delta[name]
        if self.slots is not None:
            mask, delta = self.slots[name].spread(mask), self.slots[name].spread(delta)
        return mask.view(*self.batch, -1), delta.view(self.batch)

    def _mask(self, name: str) -> Float[Tensor, "rows C"]:
        g = self.g[name]
        return g + (1 - g) * self.sources[name]

    def product(
        self,
        name: str,
        y: Float[Tensor, "*batch d_out"],
        x: Float[Tensor, "*batch d_in"],
        V: Float[Tensor, "d_in C"],
        U: Float[Tensor, "C d_out"],
        bias: Float[Tensor, " d_out"] | None,
    ) -> Float[Tensor, "*batch d_out"]:
        """The site's masked output, in the precision of ``y``."""
        kind, every, read = y.dtype, y.flatten(0, -2), x.flatten(0, -2)
        at = None if self.slots is None else self.slots[name]
        own, read = (every, read) if at is None else (at.gathered(every), at.gathered(read))
        acts, delta = read.to(kind) @ V.to(kind), self.delta[name]
        kept = own * delta if bias is None else bias + (own - bias) * delta
        output = kept.to(kind) + (acts * (self._mask(name) - delta)).to(kind) @ U.to(kind)
        if at is not None:
            output = torch.where(at.routed[:, None], at.spread(output), every)
        return output.view(y.shape)
