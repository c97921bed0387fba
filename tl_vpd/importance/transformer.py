"""Γ as one transformer shared by all sites (VPD's global shared transformer).

The sites' clean inputs, each RMS-normalised, are concatenated and projected to ``d_ci``; ``n_blocks`` pre-norm blocks with
bidirectional rotary attention follow; the output is projected to one pre-sigmoid value per subcomponent. No norm has a learned
scale and there is none before the last projection (VPD paper, section on the causal-importance function).

    z = W_out · blocks(W_in · [rms(x_1), …, rms(x_L)])          z: [batch, pos, C_total]
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

EPS = torch.finfo(torch.float32).eps
"""Added to the mean square in every norm, whatever the dtype."""


def rms_norm(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """``x / sqrt(mean(x²) + eps)``."""
    return F.rms_norm(x, (x.shape[-1],), eps=EPS)


def rotary(x: Float[Tensor, "batch head pos d_head"], base: float = 10_000.0) -> Float[Tensor, "batch head pos d_head"]:
    """Rotates by position, half-split: dimension i turns together with dimension ``i + d_head/2``."""
    half = x.shape[-1] // 2
    frequencies = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Block(nn.Module):
    """A pre-norm block: bidirectional attention without biases, then Linear–GELU–Linear with biases."""

    def __init__(self, d: int, n_heads: int, d_mlp: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.mlp_in = nn.Linear(d, d_mlp)
        self.mlp_out = nn.Linear(d_mlp, d)

    def forward(
        self, x: Float[Tensor, "batch pos d"], attend: Bool[Tensor, "batch 1 _ pos"] | None
    ) -> Float[Tensor, "batch pos d"]:
        h = rms_norm(x)
        q, k, v = (rearrange(f(h), "b p (h d) -> b h p d", h=self.n_heads) for f in (self.q, self.k, self.v))
        z = F.scaled_dot_product_attention(rotary(q), rotary(k), v, attn_mask=attend)
        x = x + self.o(rearrange(z, "b h p d -> b p (h d)"))
        return x + self.mlp_out(F.gelu(self.mlp_in(rms_norm(x))))


class SharedTransformer(nn.Module):
    """One transformer that reads every site's input and gives every subcomponent's pre-sigmoid value.

    Args:
        d_in: input width by site, in the order in which they are concatenated.
        counts: number of subcomponents by site, in the order of the output.
        d_ci: width.
        n_blocks: depth.
        n_heads: attention heads.
        d_mlp: MLP width (None: ``4 * d_ci``).

    Raises:
        ValueError: ``d_ci`` does not divide into heads of even width.
    """

    needs = "inputs"

    def __init__(
        self,
        d_in: Mapping[str, int],
        counts: Mapping[str, int],
        *,
        d_ci: int,
        n_blocks: int,
        n_heads: int,
        d_mlp: int | None = None,
    ) -> None:
        super().__init__()
        if d_ci % n_heads or (d_ci // n_heads) % 2:
            raise ValueError(f"d_ci={d_ci} does not divide into n_heads={n_heads} heads of even width; change either.")
        self.names = list(d_in)
        self.embed = nn.Linear(sum(d_in.values()), d_ci)
        self.blocks = nn.ModuleList(Block(d_ci, n_heads, d_mlp or 4 * d_ci) for _ in range(n_blocks))
        self.unembed = nn.Linear(d_ci, sum(counts.values()))

    def forward(
        self, inputs: Mapping[str, Float[Tensor, "batch pos _"]], token_mask: Bool[Tensor, "batch pos"] | None = None
    ) -> Float[Tensor, "batch pos C_total"]:
        """Pre-sigmoid values; ``token_mask`` is False at padding, which no other position then attends to."""
        # Q, K and V usually share one input tensor: normalise it once. (Under sharding, to read the bias is cheaper.)
        normed: dict[int, Tensor] = {}
        dtype = self.embed.bias.dtype
        for name in self.names:
            x = inputs[name]
            if id(x) not in normed:
                normed[id(x)] = rms_norm(x.to(dtype))
        x = self.embed(torch.cat([normed[id(inputs[name])] for name in self.names], dim=-1))
        attend = None
        if token_mask is not None:
            # A padded query attends to itself, so that no row of the softmax is empty.
            eye = torch.eye(token_mask.shape[-1], dtype=torch.bool, device=token_mask.device)
            attend = token_mask[:, None, None, :] | eye
        for block in self.blocks:
            x = block(x, attend)
        return self.unembed(x)

    def output_biases(self) -> list[Tensor]:
        """The biases that are added last."""
        return [self.unembed.bias]
