"""Γ as small MLPs: one a subcomponent (SPD's, right for toys), or one a site.

Per subcomponent, on its own inner activation: ``z_c = w₂_c · GELU(w₁_c · a_c + b₁_c) + b₂_c``. Per site, on the site's
RMS-normalised input: ``z = W₂ GELU(W₁ x + b₁) + b₂``. Neither sees other positions or other sites.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tl_vpd.importance.transformer import rms_norm
from tl_vpd.site import Packing


class PerSubcomponentMLPs(nn.Module):
    """One MLP of ``hidden`` GELU units for every subcomponent, reading its inner activation alone."""

    needs = "acts"

    def __init__(self, counts: Mapping[str, int], *, hidden: int) -> None:
        super().__init__()
        self.packing = Packing(counts)
        total = self.packing.total
        self.w_in = nn.Parameter(torch.randn(total, hidden))
        self.b_in = nn.Parameter(torch.zeros(total, hidden))
        self.w_out = nn.Parameter(torch.randn(total, hidden) / hidden**0.5)
        self.b_out = nn.Parameter(torch.zeros(total))

    def forward(
        self, acts: Mapping[str, Float[Tensor, "*batch _"]], keep: Bool[Tensor, "*batch"] | None = None
    ) -> Float[Tensor, "*batch C_total"]:
        """Pre-sigmoid values from inner activations (one site at a time: the hidden layer is the large tensor)."""
        # Under sharding, every reading of a parameter gathers it.
        w_in, b_in, w_out, b_out = self.w_in, self.b_in, self.w_out, self.b_out
        values = []
        for name, where in self.packing.slices.items():
            a = acts[name].to(w_in.dtype)
            h = F.gelu(a[..., None] * w_in[where] + b_in[where])
            values.append((h * w_out[where]).sum(-1) + b_out[where])
        return torch.cat(values, dim=-1)

    def output_biases(self) -> list[Tensor]:
        """The biases that are added last."""
        return [self.b_out]


class PerSiteMLPs(nn.Module):
    """One MLP of ``hidden`` GELU units for every site, reading the site's RMS-normalised input."""

    needs = "inputs"

    def __init__(self, d_in: Mapping[str, int], counts: Mapping[str, int], *, hidden: int) -> None:
        super().__init__()
        self.names = list(d_in)
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(d_in[n], hidden), nn.GELU(), nn.Linear(hidden, counts[n])) for n in self.names
        )

    def forward(
        self, inputs: Mapping[str, Float[Tensor, "*batch _"]], keep: Bool[Tensor, "*batch"] | None = None
    ) -> Float[Tensor, "*batch C_total"]:
        """Pre-sigmoid values from site inputs."""
        dtype = self.mlps[0][0].bias.dtype  # type: ignore[index]
        parts = [mlp(rms_norm(inputs[n].to(dtype))) for n, mlp in zip(self.names, self.mlps, strict=True)]
        return torch.cat(parts, dim=-1)

    def output_biases(self) -> list[Tensor]:
        """The biases that are added last."""
        return [mlp[-1].bias for mlp in self.mlps]  # type: ignore[index]
