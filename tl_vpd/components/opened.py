"""A masked pass whose importances and sources are tensors of autograd's graph, for recording and compiling.

    m = g + (1 − g) r,      y = b + m_Δ (y₀ − b) + (a ⊙ (m − m_Δ)) @ U,      a = x @ V

The same products as ``SourcedPass``'s, written as plain operations without blocks, buffers or data-dependent shapes: masks would
fill memory if these ran as they stand, but a compiler makes them inside the loops that use them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class OpenPass:
    """Importances, sources, Δ's sources and routing of one masked pass by site, tokens on the first axis.

    Args:
        g, sources, delta: by masked site; gradients reach them. batch: the shape that tokens have in the model.
        routing: where the masked path is taken (None: everywhere); elsewhere a site's output is the model's own.
    """

    def __init__(
        self,
        g: Mapping[str, Float[Tensor, "tokens _"]],
        sources: Mapping[str, Float[Tensor, "tokens _"]],
        delta: Mapping[str, Float[Tensor, "tokens 1"]],
        batch: torch.Size,
        routing: Mapping[str, Bool[Tensor, " tokens"]] | None = None,
    ) -> None:
        self.g, self.sources, self.delta, self.batch = g, sources, delta, batch
        self.routing = None if routing is None else {name: at.view(batch) for name, at in routing.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.g

    def mask(self, name: str) -> tuple[Float[Tensor, "*batch C"], Float[Tensor, "*batch"]]:
        """One site's mask and Δ's."""
        return self._mask(name).view(*self.batch, -1), self.delta[name].view(self.batch)

    def _mask(self, name: str) -> Float[Tensor, "tokens C"]:
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
        kind, own = y.dtype, y.flatten(0, -2)
        acts, delta = x.flatten(0, -2).to(kind) @ V.to(kind), self.delta[name]
        kept = own * delta if bias is None else bias + (own - bias) * delta
        output = kept.to(kind) + (acts * (self._mask(name) - delta)).to(kind) @ U.to(kind)
        if self.routing is not None:
            output = torch.where(self.routing[name].view(-1, 1), output, own)
        return output.view(y.shape)
