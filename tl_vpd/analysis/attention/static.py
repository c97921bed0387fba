"""Static interaction strengths: what a pair of subcomponents would add to a head's scores, from the weights alone.

    static(c, c', τ, h) = (σ_c ‖V_Q,c‖ U^h_Q,c)ᵀ R_τ (σ_c' ‖V_K,c'‖ U^h_K,c')          τ = t − t'

R_τ is the layer's rotation (the identity without one) and σ the sign of a subcomponent's mean inner activation where it is
important, so that the sign of a strength is that of what the pair adds when both fire as they usually do. Strengths are before
scaling. ``standardised`` subtracts each head's mean over all pairs and offsets and divides by its standard deviation. Source: VPD
paper, section on attention.

    >>> ends = ["blocks.1.attn.W_Q:3"]
    >>> static_strengths(vpd, model, tokens, 1, subcomponents=ends).top(5)                                # doctest: +SKIP

Left out: how often the two fire together, which ``mean_strengths`` takes into account.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_vpd.analysis.attention.kernel import ScoreKernel
from tl_vpd.analysis.attention.layer import AttentionLayer, AttentionPass
from tl_vpd.checks import integer
from tl_vpd.decomposition import Decomposition
from tl_vpd.printing import Printed
from tl_vpd.site import Site, Subcomponent

ENTRIES = 1 << 22
"""Strengths that are formed at once while all pairs are gone through."""


def usual_signs(
    acts: Float[Tensor, "*batch C"], importances: Float[Tensor, "*batch C"], *, threshold: float = 0.0
) -> Float[Tensor, " C"]:
    """σ: the sign of each subcomponent's mean activation where its importance exceeds ``threshold`` (+1 if it never does)."""
    important = importances > threshold
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
class StaticStrengths(Printed):
    """Strengths of chosen pairs.

    Attributes:
        layer: the block's index.
        queries: subcomponents of W_Q.
        keys: subcomponents of W_K.
        offsets: positions that the key is before the query.
        values: the strengths.
        mean: of each head, over *all* pairs and offsets of the layer.
        std: the standard deviation of each head, likewise.
    """

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
        """One row per pair, head and offset: query, key, head, offset, strength, standardised."""
        return self._table(torch.arange(self.values.numel(), device=self.values.device))

    def top(self, k: int = 10) -> pd.DataFrame:
        """The ``k`` largest standardised strengths by size."""
        k, flat = integer("k", k, minimum=0), self.standardised.flatten()
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
    prompts: Any,
    layer: int,
    *,
    subcomponents: Sequence[str | Subcomponent] | None = None,
    length: int | None = None,
    attention_mask: Tensor | None = None,
) -> StaticStrengths:
    """Static strengths of chosen pairs of a layer.

    Args:
        decomposition: with W_Q and W_K of the block.
        model: the target.
        prompts: the usual signs σ are those on these; a string, strings, or tokens ``[batch, pos]``.
        layer: the block's index.
        subcomponents: of W_Q and W_K (all of a side that none is of); the result holds pairs × heads × offsets numbers.
        length: offsets below it (None: those within the prompts).
        attention_mask: 0 at padding (None: where TransformerLens sees padding).

    Raises:
        Unsupported: the layer's scores are not bilinear in queries and keys.
        KeyError: a site is not decomposed.
        IndexError: there is no such subcomponent.
        ValueError: a subcomponent is of another site, the prompts do not fit, or the model has other weights.
    """
    attention = AttentionLayer(decomposition, model, layer)
    chosen = attention.sides(subcomponents)
    kernel, queries, keys = _signed(attention, prompts, length, attention_mask)
    values = strengths_of(queries[chosen[0]], keys[chosen[1]], kernel.values)
    return _strengths(attention, kernel, chosen, values, _statistics(queries, keys, kernel))


@torch.no_grad()
def strongest_static(
    decomposition: Decomposition,
    model: nn.Module,
    prompts: Any,
    layer: int,
    k: int = 20,
    *,
    length: int | None = None,
    attention_mask: Tensor | None = None,
) -> pd.DataFrame:
    """The ``k`` largest standardised strengths over all pairs, heads and offsets of a layer, gone through in blocks.

    Other arguments, and errors, as in ``static_strengths``; the table's columns as in ``StaticStrengths.to_pandas``.
    """
    k, attention = integer("k", k, minimum=0), AttentionLayer(decomposition, model, layer)
    kernel, queries, keys = _signed(attention, prompts, length, attention_mask)
    statistics = _statistics(queries, keys, kernel)
    best = [
        _strengths(attention, kernel, chosen, values, statistics).top(k)
        for chosen, values in _blocks(queries, keys, kernel)
    ]
    table = pd.concat(best, ignore_index=True)
    order = table["standardised"].abs().sort_values(ascending=False, kind="stable").index[:k]
    return table.loc[order].reset_index(drop=True)


def _strengths(
    attention: AttentionLayer,
    kernel: ScoreKernel,
    chosen: tuple[Sequence[int], Sequence[int]],
    values: Tensor,
    statistics: tuple[Tensor, Tensor],
) -> StaticStrengths:
    queries, keys = (
        tuple(Subcomponent(site.name, i) for i in indices)
        for site, indices in zip((attention.q, attention.k), chosen, strict=True)
    )
    return StaticStrengths(attention.index, queries, keys, kernel.offsets, values, *statistics)


def _signed(
    attention: AttentionLayer, prompts: Any, length: int | None, attention_mask: Tensor | None
) -> tuple[ScoreKernel, Tensor, Tensor]:
    """The rotation alone, and ``σ_c ‖V_c‖ U^h_c`` of all queries and keys."""
    clean = attention.clean(prompts, attention_mask)
    kernel = attention.kernel(clean.tokens.shape[1] if length is None else length)
    rotation = ScoreKernel(kernel.layer, kernel.offsets, kernel.values * kernel.scale)
    queries = _scaled(attention, attention.q, attention.query_writes, clean)
    return rotation, queries, _scaled(attention, attention.k, attention.key_writes, clean)


def _scaled(attention: AttentionLayer, site: Site, writes: Tensor, clean: AttentionPass) -> Tensor:
    C = attention.decomposition.counts[site.name]
    g = clean.importances[..., attention.decomposition.site_axis.slices[site.name]]
    sigma = usual_signs(attention.acts(site, clean.inputs)[..., :C], g.to(writes))
    norms = attention.decomposition.V[site.name].detach().to(writes).norm(dim=0)
    return writes[:C] * (sigma * norms)[:, None, None]


def _blocks(
    queries: Tensor, keys: Tensor, kernel: ScoreKernel
) -> Iterator[tuple[tuple[range, range], Float[Tensor, "query_c key_c head offset"]]]:
    """Strengths of ``ENTRIES`` numbers at a time, and which queries and keys they are of."""
    per_pair = keys.shape[1] * len(kernel.offsets)
    n_keys = min(len(keys), max(1, ENTRIES // per_pair))
    n_queries = max(1, ENTRIES // (per_pair * n_keys))
    for q in range(0, len(queries), n_queries):
        for k in range(0, len(keys), n_keys):
            chosen = range(q, min(q + n_queries, len(queries))), range(k, min(k + n_keys, len(keys)))
            yield chosen, strengths_of(queries[q : q + n_queries], keys[k : k + n_keys], kernel.values)


def _statistics(
    queries: Tensor, keys: Tensor, kernel: ScoreKernel
) -> tuple[Float[Tensor, " head"], Float[Tensor, " head"]]:
    """Mean and standard deviation of each head over all pairs and offsets."""
    total = torch.zeros(2, queries.shape[1], dtype=torch.float64, device=queries.device)
    for _, values in _blocks(queries, keys, kernel):
        by_head = values.double().movedim(2, 0).flatten(1)
        total += torch.stack([by_head.sum(1), by_head.square().sum(1)])
    n = len(queries) * len(keys) * len(kernel.offsets)
    mean = total[0] / n
    return mean.to(queries), (total[1] / n - mean.square()).clamp(min=0).sqrt().to(queries)
