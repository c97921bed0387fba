"""Γ as one MLP with a single hidden layer for all sites, position by position (targeted decomposition, arXiv 2607.13047).

The sites' clean inputs, each RMS-normalised, are concatenated:

    z = W₂ GELU(W₁ · [rms(x_1), …, rms(x_L)] + b₁) + b₂          z: [batch, pos, C_total]

It reads no other position, so that it is causal, and cheap where a few prompts are decomposed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tl_vpd.importance.transformer import GammaCache, concatenated_norms


class GlobalMLP(nn.Module):
    """One MLP of ``hidden`` GELU units, which reads every site's input and gives every subcomponent's pre-sigmoid value.

    Args:
        d_in: input width by site, in the order in which they are concatenated.
        counts: number of subcomponents by site, in the order of the output.
        hidden: units.
    """

    needs = "inputs"

    def __init__(self, d_in: Mapping[str, int], counts: Mapping[str, int], *, hidden: int) -> None:
        super().__init__()
        self.names = list(d_in)
        self.embed = nn.Linear(sum(d_in.values()), hidden)
        self.unembed = nn.Linear(hidden, sum(counts.values()))

    def forward(
        self,
        inputs: Mapping[str, Float[Tensor, "*batch _"]],
        token_mask: Bool[Tensor, "batch _"] | None = None,
        cache: GammaCache | None = None,
    ) -> Float[Tensor, "*batch C_total"]:
        """Pre-sigmoid values from site inputs; other tokens, and so their mask and cache, do not matter."""
        return self.unembed(F.gelu(self.embed(concatenated_norms(inputs, self.names, self.embed.bias.dtype))))

    def output_biases(self) -> list[Tensor]:
        """The biases that are added last."""
        return [self.unembed.bias]

    def rows_of_subcomponents(self) -> dict[str, list[str]]:
        """By parameter that has one row per subcomponent: the sites whose subcomponents they are, in order."""
        return {"unembed.weight": self.names, "unembed.bias": self.names}
