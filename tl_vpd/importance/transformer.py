"""Γ as one transformer shared by all sites (VPD's global shared transformer).

The sites' clean inputs, each RMS-normalised, are concatenated and projected to ``d_ci``; ``n_blocks`` pre-norm blocks with
rotary attention follow; the output is projected to one pre-sigmoid value per subcomponent. No norm has a learned scale and there
is none before the last projection (VPD paper, section on the causal-importance function).

    z = W_out · blocks(W_in · [rms(x_1), …, rms(x_L)])          z: [batch, pos, C_total]

The paper's attention is bidirectional, so that importances at a position depend on later tokens. With ``causal=True`` they
depend on its prefix alone, and a ``GammaCache`` lets them be computed token by token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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


def concatenated_norms(
    inputs: Mapping[str, Float[Tensor, "*batch _"]], names: Sequence[str], dtype: torch.dtype
) -> Float[Tensor, "*batch d"]:
    """``[rms(x_1), …, rms(x_L)]``.

    Args:
        inputs: by name.
        names: which, in order.
        dtype: of the result.
    """
    normed: dict[int, Tensor] = {}
    for name in names:  # Q, K and V usually share one input tensor: normalise it once
        x = inputs[name]
        if id(x) not in normed:
            normed[id(x)] = rms_norm(x.to(dtype))
    return torch.cat([normed[id(inputs[name])] for name in names], dim=-1)


def rotary(
    x: Float[Tensor, "batch head pos d_head"], *, start: int = 0, base: float = 10_000.0
) -> Float[Tensor, "batch head pos d_head"]:
    """Rotates by position, half-split: dimension i turns together with dimension ``i + d_head/2``.

    Args:
        x: queries or keys.
        start: position of the first.
        base: of the frequencies.
    """
    half = x.shape[-1] // 2
    frequencies = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    positions = torch.arange(start, start + x.shape[-2], device=x.device, dtype=torch.float32)
    angles = positions[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


@dataclass
class GammaCache:
    """Keys and values of the tokens that a causal Γ has read, by block: what later tokens attend to.

    Attributes:
        blocks: keys and values ``[batch, head, pos, d_head]`` by block.
    """

    blocks: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __deepcopy__(self, memo: Any) -> GammaCache:
        return GammaCache(dict(self.blocks))  # tensors are never changed in place, and blocks are Γ's

    @property
    def length(self) -> int:
        """The number of tokens that have been read."""
        return next((keys.shape[-2] for keys, _ in self.blocks.values()), 0)

    def extend(self, block: nn.Module, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds the keys and values of new tokens; all of the block's."""
        if block in self.blocks:
            k, v = (torch.cat(pair, dim=-2) for pair in zip(self.blocks[block], (k, v), strict=True))
        self.blocks[block] = k, v
        return k, v


class Block(nn.Module):
    """A pre-norm block: attention without biases, then Linear–GELU–Linear with biases."""

    def __init__(self, d: int, n_heads: int, d_mlp: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.mlp_in = nn.Linear(d, d_mlp)
        self.mlp_out = nn.Linear(d_mlp, d)

    def forward(
        self,
        x: Float[Tensor, "batch pos d"],
        attend: Bool[Tensor, "batch 1 _ pos_of_keys"] | Bool[Tensor, "_ pos_of_keys"] | None,
        *,
        causal: bool = False,
        cache: GammaCache | None = None,
    ) -> Float[Tensor, "batch pos d"]:
        h = rms_norm(x)
        q, k, v = (rearrange(f(h), "b p (h d) -> b h p d", h=self.n_heads) for f in (self.q, self.k, self.v))
        start = 0 if cache is None or self not in cache.blocks else cache.blocks[self][0].shape[-2]
        q, k = rotary(q, start=start), rotary(k, start=start)
        if cache is not None:
            k, v = cache.extend(self, k, v)
        z = F.scaled_dot_product_attention(
            q, k, v, attn_mask=attend, is_causal=causal and attend is None and start == 0
        )
        x = x + self.o(rearrange(z, "b h p d -> b p (h d)"))
        return x + self.mlp_out(F.gelu(self.mlp_in(rms_norm(x))))


class SharedTransformer(nn.Module):
    """One transformer that reads every site's input and gives every subcomponent's pre-sigmoid value.

    Args:
        d_in: width by input (those of sites, or residual streams), in the order in which they are concatenated.
        counts: number of subcomponents by site, in the order of the output.
        d_ci: width.
        n_blocks: depth.
        n_heads: attention heads.
        d_mlp: MLP width (None: ``4 * d_ci``).
        causal: whether a position attends to itself and earlier ones alone.

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
        causal: bool = False,
    ) -> None:
        super().__init__()
        if d_ci % n_heads or (d_ci // n_heads) % 2:
            raise ValueError(f"d_ci={d_ci} does not divide into n_heads={n_heads} heads of even width; change either.")
        self.names, self.sites, self.causal = list(d_in), list(counts), causal
        self.embed = nn.Linear(sum(d_in.values()), d_ci)
        self.blocks = nn.ModuleList(Block(d_ci, n_heads, d_mlp or 4 * d_ci) for _ in range(n_blocks))
        self.unembed = nn.Linear(d_ci, sum(counts.values()))

    def forward(
        self,
        inputs: Mapping[str, Float[Tensor, "batch pos _"]],
        token_mask: Bool[Tensor, "batch pos_of_keys"] | None = None,
        cache: GammaCache | None = None,
    ) -> Float[Tensor, "batch pos C_total"]:
        """Pre-sigmoid values.

        Args:
            inputs: by name; others are left aside.
            token_mask: False at padding, which no other position then attends to; with a cache, of the cached tokens too.
            cache: of the tokens before these, which is extended; only a causal Γ can have one.

        Raises:
            ValueError: there is a cache and Γ is bidirectional.
        """
        if cache is not None and not self.causal:
            raise ValueError("A bidirectional Γ reads later tokens too, so that it cannot go on from a cache.")
        # Under sharding, a bias is cheaper to read than a weight.
        x = self.embed(concatenated_norms(inputs, self.names, self.embed.bias.dtype))
        start = 0 if cache is None else self._cached(cache)
        attend = _attend(x.shape[-2], start, token_mask, x.device, causal=self.causal)
        for block in self.blocks:
            x = block(x, attend, causal=self.causal, cache=cache)
        return self.unembed(x)

    def _cached(self, cache: GammaCache) -> int:
        """How many tokens of this transformer are in a cache (others' may be in it too)."""
        first = self.blocks[0]
        return cache.blocks[first][0].shape[-2] if first in cache.blocks else 0

    def output_biases(self) -> list[Tensor]:
        """The biases that are added last."""
        return [self.unembed.bias]

    def rows_of_subcomponents(self) -> dict[str, list[str]]:
        """By parameter that has one row per subcomponent: the sites whose subcomponents they are, in order."""
        return {"unembed.weight": self.sites, "unembed.bias": self.sites}


def _attend(
    n: int, start: int, token_mask: Bool[Tensor, "batch pos_of_keys"] | None, device: torch.device, *, causal: bool
) -> Bool[Tensor, "batch 1 _ pos_of_keys"] | Bool[Tensor, "_ pos_of_keys"] | None:
    """Which keys each of ``n`` queries attends to; None where the attention function needs no mask for it.

    Args:
        n: queries, at positions from ``start``.
        start: keys before them.
        token_mask: False at keys of padding.
        device: of the mask.
        causal: whether later keys are left out.
    """
    if token_mask is None and (start == 0 or n == 1):
        return None
    mask = torch.ones(n, start + n, dtype=torch.bool, device=device)
    if causal:
        mask = mask.tril(start)
    if token_mask is None:
        return mask
    # A padded query attends to itself, so that no row of the softmax is empty.
    itself = F.pad(torch.eye(n, dtype=torch.bool, device=device), (start, 0))
    return (mask & token_mask[:, None, None, :]) | itself
