"""Static interaction strengths: what a pair of subcomponents would add to a head's scores, from the weights alone.

    static(c, c', τ, h) = (σ_c ‖V_Q,c‖ U^h_Q,c)ᵀ R_τ (σ_c' ‖V_K,c'‖ U^h_K,c')          τ = t − t'

R_τ is the layer's own rotation (the identity without one) and σ the sign of a subcomponent's mean inner activation where it is
important, so that the sign of a strength is that of what the pair adds when both fire as they usually do. Strengths are before
scaling. ``standardised`` subtracts each head's mean over all pairs and offsets and divides by its standard deviation. Source: the
VPD paper (*Interpreting Language Model Parameters*), section on attention.

    >>> found = static_strengths(vpd, model, 1, tokens, queries=["blocks.1.attn.W_Q:3"])                  # doctest: +SKIP
    >>> found.top(5)                                                                                      # doctest: +SKIP

Left out: how often the two fire together, which ``mean_strengths`` weighs in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_vpd.analysis.attention.kernel import ScoreKernel
from tl_vpd.analysis.attention.layer import AttentionLayer, Seen, indices
from tl_vpd.site import Site, Subcomponent

if TYPE_CHECKING:
    from tl_vpd.decomposition import Decomposition

_ENTRIES = 1 << 22
"""Strengths held at once while all pairs are gone through."""


def usual_signs(
    acts: Float[Tensor, "*batch C"], importances: Float[Tensor, "*batch C"], *, above: float = 0.0
) -> Float[Tensor, " C"]:
    """σ: the sign of each subcomponent's mean inner activation where its importance exceeds ``above`` (+1 if it never does)."""
    important = importances > above
    mean = (acts * important).flatten(0, -2).sum(0)
    return torch.where(mean < 0, -1.0, 1.0).to(acts)


def strengths_of(
    queries: Float[Tensor, "query_c head d_head"],
    keys: Float[Tensor, "key_c head d_head"],
    kernel: Float[Tensor, "offset d_head d_head"],
) -> Float[Tensor, "query_c key_c head offset"]:
    """``q_hᵀ K_τ k_h`` for every query, key, head and offset."""
    turned = torch.einsum("qhd,ode->qhoe", queries, kernel)
    return torch.einsum("qhoe,khe->qkho", turned, keys)


@dataclass(frozen=True)
class StaticStrengths:
    """Strengths of the chosen pairs, with each head's mean and standard deviation over *all* pairs and offsets of the layer."""

    layer: int
    queries: tuple[Subcomponent, ...]
    keys: tuple[Subcomponent, ...]
    offsets: Int[Tensor, " offset"]
    values: Float[Tensor, "query_c key_c head offset"]
    mean: Float[Tensor, " head"]
    std: Float[Tensor, " head"]

    @cached_property
    def standardised(self) -> Float[Tensor, "query_c key_c head offset"]:
        """``(values − mean) / std`` of each head."""
        return (self.values - self.mean[:, None]) / self.std[:, None]

    def to_pandas(self) -> pd.DataFrame:
        """One row a pair, head and offset: query, key, head, offset, strength, standardised."""
        return self._table(torch.arange(self.values.numel(), device=self.values.device))

    def top(self, k: int = 10) -> pd.DataFrame:
        """The ``k`` largest standardised strengths by size."""
        flat = self.standardised.flatten()
        return self._table(flat.abs().topk(min(k, flat.numel())).indices)

    def _table(self, flat: Int[Tensor, " row"]) -> pd.DataFrame:
        query, key, head, offset = (w.tolist() for w in torch.unravel_index(flat, self.values.shape))
        offsets = self.offsets.tolist()
        return pd.DataFrame(
            {
                "query": [str(self.queries[i]) for i in query],
                "key": [str(self.keys[i]) for i in key],
                "head": head,
                "offset": [offsets[i] for i in offset],
                "strength": self.values.flatten()[flat].tolist(),
                "standardised": self.standardised.flatten()[flat].tolist(),
            }
        )


@torch.no_grad()
def static_strengths(
    decomposition: Decomposition,
    model: nn.Module,
    layer: int,
    prompts: Any,
    *,
    queries: Sequence[str | Subcomponent | int] | None = None,
    keys: Sequence[str | Subcomponent | int] | None = None,
    length: int | None = None,
    attention_mask: Tensor | None = None,
) -> StaticStrengths:
    """Static strengths of chosen pairs of a layer.

    Args:
        prompts: where the usual signs σ are taken from.
        queries, keys: subcomponents of W_Q and W_K (None: all; pairs × heads × offsets numbers are then held).
        length: offsets below it (None: those within the prompts).

    Raises:
        Unsupported: the layer's scores are not bilinear in queries and keys.
        KeyError, IndexError, ValueError: a block, subcomponent or prompt does not exist.
    """
    own = AttentionLayer(decomposition, model, layer)
    chosen_q, chosen_k = indices(decomposition, own.q, queries), indices(decomposition, own.k, keys)
    kernel, all_q, all_k = _signed(own, prompts, length, attention_mask)
    mean, std = _statistics(all_q, all_k, kernel)
    return StaticStrengths(
        layer,
        tuple(Subcomponent(own.q.name, i) for i in chosen_q),
        tuple(Subcomponent(own.k.name, i) for i in chosen_k),
        kernel.offsets,
        strengths_of(all_q[chosen_q], all_k[chosen_k], kernel.values),
        mean,
        std,
    )


@torch.no_grad()
def strongest_static(
    decomposition: Decomposition,
    model: nn.Module,
    layer: int,
    prompts: Any,
    k: int = 20,
    *,
    length: int | None = None,
    attention_mask: Tensor | None = None,
) -> pd.DataFrame:
    """The ``k`` largest standardised strengths over all pairs, heads and offsets of a layer, found a part at a time.

    Columns: query, key, head, offset, strength, standardised. Raises as ``static_strengths`` does.
    """
    own = AttentionLayer(decomposition, model, layer)
    kernel, all_q, all_k = _signed(own, prompts, length, attention_mask)
    mean, std = _statistics(all_q, all_k, kernel)
    best: list[pd.DataFrame] = []
    for first, values in _chunks(all_q, all_k, kernel):
        part = StaticStrengths(
            layer,
            tuple(Subcomponent(own.q.name, first + i) for i in range(len(values))),
            tuple(Subcomponent(own.k.name, i) for i in range(len(all_k))),
            kernel.offsets,
            values,
            mean,
            std,
        )
        best.append(part.top(k))
    table = pd.concat(best, ignore_index=True)
    order = table["standardised"].abs().sort_values(ascending=False, kind="stable").index[:k]
    return table.loc[order].reset_index(drop=True)


def _signed(
    own: AttentionLayer, prompts: Any, length: int | None, attention_mask: Tensor | None
) -> tuple[ScoreKernel, Tensor, Tensor]:
    """The rotation alone, and ``σ_c ‖V_c‖ U^h_c`` of all queries and keys."""
    seen = own.seen(prompts, attention_mask)
    kernel = own.kernel(seen.tokens.shape[1] if length is None else length)
    rotation = ScoreKernel(kernel.layer, kernel.offsets, kernel.values * kernel.scale)
    return rotation, _scaled(own, own.q, own.query_writes, seen), _scaled(own, own.k, own.key_writes, seen)


def _scaled(own: AttentionLayer, site: Site, writes: Tensor, seen: Seen) -> Tensor:
    C = own.decomposition.counts[site.name]
    g = seen.importances[..., own.decomposition.site_axis.slices[site.name]]
    sigma = usual_signs(own.acts(site, seen.inputs)[..., :C], g.to(writes))
    norms = own.decomposition.V[site.name].detach().to(writes).norm(dim=0)
    return writes[:C] * (sigma * norms)[:, None, None]


def _chunks(q: Tensor, k: Tensor, kernel: ScoreKernel) -> Iterator[tuple[int, Tensor]]:
    """Strengths of some queries with all keys at a time, and the first of these queries."""
    rows = max(1, _ENTRIES // max(1, len(k) * k.shape[1] * len(kernel.offsets)))
    for first in range(0, len(q), rows):
        yield first, strengths_of(q[first : first + rows], k, kernel.values)


def _statistics(q: Tensor, k: Tensor, kernel: ScoreKernel) -> tuple[Float[Tensor, " head"], Float[Tensor, " head"]]:
    """Mean and standard deviation of each head over all pairs and offsets."""
    total = torch.zeros(2, q.shape[1], dtype=torch.float64, device=q.device)
    for _, values in _chunks(q, k, kernel):
        own = values.double().movedim(2, 0).flatten(1)
        total += torch.stack([own.sum(1), own.square().sum(1)])
    n = len(q) * len(k) * len(kernel.offsets)
    mean = total[0] / n
    return mean.to(q), (total[1] / n - mean.square()).clamp(min=0).sqrt().to(q)
