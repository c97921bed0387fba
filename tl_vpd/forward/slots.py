"""Routed tokens in a fixed number of slots, so that shapes do not depend on the routing.

A compiled pass gathers the routed tokens of a site into slots, computes those, and puts them back. There are more slots than
tokens that are expected to be routed; the rest hold tokens that are not routed, whose results are discarded.

>>> routing = torch.tensor([[True, False, True]])
>>> [at.tolist() for at in assign_slots(routing, 2)[:2]]
[[[0, 2]], [[0, 0, 1]]]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable


class Slots(NamedTuple):
    """Where the routed tokens of one site are computed (or of all sites, in tensors with sites first).

    Attributes:
        token: of each slot; no token has two.
        slot: of each token (any slot, where it is not routed).
        routed: by token.
    """

    token: Int[Tensor, " slots"]
    slot: Int[Tensor, " tokens"]
    routed: Bool[Tensor, " tokens"]

    def gathered(self, by_token: Float[Tensor, "tokens d"]) -> Float[Tensor, "slots d"]:
        """The rows of the tokens in the slots."""
        rows: Tensor = _Lookup.apply(by_token, self.token, self.gradient)
        return rows

    def spread(self, by_slot: Float[Tensor, "slots d"]) -> Float[Tensor, "tokens d"]:
        """Rows of slots at their tokens. Tokens that are not routed get any row, which must not be used."""
        rows: Tensor = _Lookup.apply(by_slot, self.slot, lambda grad: grad[self.token])
        return rows

    def gradient(self, by_slot: Float[Tensor, "slots d"]) -> Float[Tensor, "tokens d"]:
        """Rows of slots at their tokens, 0 at tokens that are not routed."""
        return torch.where(self.routed[:, None], by_slot[self.slot], 0)


def assign_slots(routing: Bool[Tensor, "site tokens"], n: int) -> Slots:
    """Slots of sites, in tensors with sites first; no site may have more than n routed tokens."""
    token = (~routing).byte().argsort(dim=1, stable=True)[:, :n]
    slot = (routing.cumsum(1) - 1).clamp_(min=0)
    return Slots(token.contiguous(), slot, routing)


class _Lookup(torch.autograd.Function):
    """``rows[at]``. As no token has two slots, ``back`` looks up the gradient as well, and nothing is added up."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, at: Tensor, back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.back = back
        return rows[at]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.back(grad), None, None
