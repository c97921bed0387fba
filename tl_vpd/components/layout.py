"""How a site's product is computed in a pass: as a whole, or head by head under some of TransformerLens's flags.

=========  =============================  ============================  =============================  ======================
kind       input x                        activations by head a_h       output y                       when
=========  =============================  ============================  =============================  ======================
whole      ``[*batch, d_in]``             ``[*batch, C]``               ``[*batch, d_out]``            usually
split      ``[*batch, head, d_in]``       ``[*batch, head, C]``         ``[*batch, head, d_head]``     split inputs of Q, K, V
result     ``[*batch, head, d_head]``     ``[*batch, head, C]``         ``[*batch, head, d_out]``      W_O's result per head
=========  =============================  ============================  =============================  ======================

Head by head the same identity holds for every head with its rows of V (result) or columns of U (split), so a mask
``[*batch, C]`` acts on all heads alike. The site's activations are shown without a head axis in every layout: the sum of the
heads' (result), or their mean (split, where all are the same unless a hook made their inputs differ); what a hook adds to
them is divided evenly among heads (result) or added to every head (split). ``repeats`` above 1 is grouped query attention
computed ungrouped: every key/value head appears that many times in y.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The shape of one site's product in a pass.

    Attributes:
        kind: see above.
        n_heads: the heads of V or U as stored.
        repeats: how often each head appears in y.
        x_has_heads: whether the model's x has a head axis, which a whole product flattens.
        y_has_heads: whether the model's y has one.
    """

    kind: Literal["whole", "split", "result"] = "whole"
    n_heads: int = 1
    repeats: int = 1
    x_has_heads: bool = False
    y_has_heads: bool = False

    @property
    def by_head(self) -> bool:
        """Whether activations have a head axis."""
        return self.kind != "whole"

    def input_of_site(self, x: Float[Tensor, "*batch d_x"]) -> Float[Tensor, "*rows d_in"]:
        """The site's input ``[*batch, d_in]`` from the model's x (of split inputs the mean over heads)."""
        if self.kind == "split":
            return x.mean(-2)
        return x.flatten(-2) if self.x_has_heads else x

    def shown(self, acts: Float[Tensor, "*batch C"]) -> Float[Tensor, "*rows C"]:
        """The site's activations without a head axis."""
        if self.kind == "whole":
            return acts
        return acts.mean(-2) if self.kind == "split" else acts.sum(-2)

    def patched(
        self, acts: Float[Tensor, "*batch C"], shown: Float[Tensor, "*rows C"], patched: Float[Tensor, "*rows C"]
    ) -> Float[Tensor, "*batch C"]:
        """Activations in this layout after a hook turned ``shown`` into ``patched``."""
        if self.kind == "whole":
            return patched
        change = (patched - shown).unsqueeze(-2)
        return acts + (change if self.kind == "split" else change / self.n_heads)

    def aligned(self, tensor: Float[Tensor, "*batch d"], *, has_heads: bool) -> Float[Tensor, "*rows d_aligned"]:
        """x or y with a head axis where the product is by head, and without where it is whole."""
        if self.by_head == has_heads:
            return tensor
        return tensor.unflatten(-1, (self.n_heads * self.repeats, -1)) if self.by_head else tensor.flatten(-2)

    def acts(self, x: Float[Tensor, "*batch d_x"], V: Float[Tensor, "d_in C"]) -> Float[Tensor, "*batch C"]:
        """``x @ V``, by head where the layout is."""
        if self.kind == "result":
            return torch.einsum("...hd,hdc->...hc", x, V.unflatten(0, (self.n_heads, -1)))
        return x @ V

    def _repeat(self, by_head: Tensor, axis: int) -> Tensor:
        return by_head.repeat_interleave(self.repeats, dim=axis) if self.repeats > 1 else by_head

    def write_directions(self, U: Float[Tensor, "C d_out"]) -> Float[Tensor, "*head C d_write"]:
        """U in the layout of y: with a leading head axis where the product is by head, key/value heads repeated."""
        if self.kind == "result" or (self.kind == "whole" and self.repeats == 1):
            return U
        by_head = self._repeat(U.unflatten(1, (self.n_heads, -1)), 1)  # [C, head, d_head]
        return by_head.transpose(0, 1) if self.kind == "split" else by_head.flatten(1)

    def site_bias(self, bias: Float[Tensor, " d_out"]) -> Float[Tensor, "*head d_write"]:
        """The bias in the shape of ``write_directions``."""
        if self.kind == "whole" and self.repeats == 1:
            return bias
        by_head = self._repeat(bias.unflatten(0, (self.n_heads, -1)), 0)
        return by_head if self.kind == "split" else by_head.flatten()


WHOLE = Layout()
