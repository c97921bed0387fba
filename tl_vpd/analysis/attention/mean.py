"""What pairs add to scores on average, by how far back they look: static geometry weighted by how the two fire together.

    mean(c, c', h, τ) = E_t[ a_Q,c(t) a_K,c'(t − τ) ] · U^h_Q,cᵀ K_τ U^h_K,c'

over all tokens t of the prompts that have one τ positions before them. Summed over pairs, with Δ and position terms, it is the
mean score at that offset. Softmax sees differences between keys only, so what makes a head look one token back is a term that is
larger at offset 1 than elsewhere: ``contrast`` subtracts a term's mean over the other offsets, each weighted by how often it
occurs. Biases take part as one more member of each side, written ``bias``, whose activation is 1.

    >>> strengths = mean_strengths(vpd, model, tokens, 1)                                                 # doctest: +SKIP
    >>> strengths.top(5, offset=1)                                                                        # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_vpd.analysis.attention.layer import BIAS, AttentionLayer
from tl_vpd.checks import integer, shown
from tl_vpd.decomposition import Decomposition
from tl_vpd.printing import Printed
from tl_vpd.site import Site, Subcomponent


@dataclass(frozen=True)
class MeanStrengths(Printed):
    """Mean contributions to scores (scaled as the model scales them) of pairs by head and offset.

    Attributes:
        layer: the block's index.
        queries: subcomponents of W_Q; ``bias`` is last where the site has one.
        keys: subcomponents of W_K, likewise.
        offsets: positions that the key is before the query.
        counts: over how many pairs of tokens each offset's mean goes.
        values: the contributions.
    """

    layer: int
    queries: tuple[str, ...]
    keys: tuple[str, ...]
    offsets: Int[Tensor, " offset"]
    counts: Int[Tensor, " offset"]
    values: Float[Tensor, "query_c key_c head offset"]

    def contrast(self, offset: int) -> Float[Tensor, "query_c key_c head"]:
        """The strength at an offset minus its mean over the others, weighted by ``counts``; raises IndexError elsewhere."""
        index = self._index(offset)
        others = self.counts.to(self.values)
        others[index] = 0
        return self.values[..., index] - self.values @ (others / others.sum().clamp(min=1))

    def _index(self, offset: int) -> int:
        offset = integer("offset", offset)
        index = offset - int(self.offsets[0])
        if not 0 <= index < len(self.offsets) or not self.counts[index]:
            raise IndexError(
                f"Offset {offset} does not occur: offsets run from {int(self.offsets[0])} to {int(self.offsets[-1])}."
            )
        return index

    def heads(self, query: str | Subcomponent, key: str | Subcomponent, *, offset: int) -> pd.DataFrame:
        """One row per head: strength, contrast, and the head's fraction of the pair's summed absolute contrast. Raises KeyError
        for a pair, IndexError for an offset that is not among these.
        """
        i, j = _position(self.queries, query), _position(self.keys, key)
        contrast = self.contrast(offset)[i, j]
        return pd.DataFrame(
            {
                "head": range(len(contrast)),
                "strength": self.values[i, j, :, self._index(offset)].tolist(),
                "contrast": contrast.tolist(),
                "fraction": (contrast.abs() / contrast.abs().sum()).tolist(),
            }
        )

    def top(self, k: int = 10, *, offset: int = 1, head: int | None = None) -> pd.DataFrame:
        """The ``k`` pairs of largest contrast at an offset, summed over heads (or in one): query, key, contrast, heads.

        ``heads`` is over how many heads the pair is spread: ``(Σ_h x_h)² / Σ_h x_h²`` of the heads' positive contrasts x.
        """
        k, by_head = integer("k", k, minimum=0), self.contrast(offset)
        if head is not None:
            head = integer("head", head, minimum=0, maximum=by_head.shape[-1] - 1)
        total = by_head.sum(-1) if head is None else by_head[..., head]
        best = total.flatten().topk(min(k, total.numel())).indices
        query, key = (w.tolist() for w in torch.unravel_index(best, total.shape))
        positive = by_head.flatten(0, 1)[best].clamp(min=0)
        spread = positive.sum(-1).square() / positive.square().sum(-1).clamp(min=1e-30)
        return pd.DataFrame(
            {
                "query": [self.queries[i] for i in query],
                "key": [self.keys[i] for i in key],
                "contrast": total.flatten()[best].tolist(),
                "heads": spread.tolist(),
            }
        )

    def to_pandas(self, *, offset: int) -> pd.DataFrame:
        """One row per pair and head at one offset: query, key, head, strength, contrast."""
        n_q, n_k, n_h, _ = self.values.shape
        return pd.DataFrame(
            {
                "query": [q for q in self.queries for _ in range(n_k * n_h)],
                "key": [k for k in self.keys for _ in range(n_h)] * n_q,
                "head": list(range(n_h)) * (n_q * n_k),
                "strength": self.values[..., self._index(offset)].flatten().tolist(),
                "contrast": self.contrast(offset).flatten().tolist(),
            }
        )


def _position(names: tuple[str, ...], name: str | Subcomponent) -> int:
    if not isinstance(name, str | Subcomponent) or str(name) not in names:
        raise KeyError(f"{shown(name)} is not among the {len(names)} that strengths were computed for.")
    return names.index(str(name))


def mean_products(
    q: Float[Tensor, "batch pos query_c"],
    k: Float[Tensor, "batch pos key_c"],
    offset: int,
    token_mask: Bool[Tensor, "batch pos"] | None = None,
) -> tuple[Float[Tensor, "query_c key_c"], int]:
    """``E_t[q(t) k(t − τ)]`` over real tokens, and over how many."""
    n = q.shape[1]
    t = torch.arange(max(0, offset), min(n, n + offset), device=q.device)
    later, earlier = q[:, t], k[:, t - offset]
    if token_mask is None:
        count = later.shape[0] * later.shape[1]
    else:
        both = token_mask[:, t] & token_mask[:, t - offset]
        later, count = later * both[..., None], int(both.sum())
    return torch.einsum("btq,btk->qk", later, earlier) / max(count, 1), count


@torch.no_grad()
def mean_strengths(
    decomposition: Decomposition,
    model: nn.Module,
    prompts: Any,
    layer: int,
    *,
    subcomponents: Sequence[str | Subcomponent] | None = None,
    max_offset: int = 16,
    attention_mask: Tensor | None = None,
) -> MeanStrengths:
    """Mean contributions of pairs to a layer's scores on prompts, for offsets up to ``max_offset``.

    Args:
        decomposition: with W_Q and W_K of the block.
        model: the target.
        prompts: a string, strings, or tokens ``[batch, pos]``.
        layer: the block's index.
        subcomponents: of W_Q and W_K (all of a side that none is of); the result holds pairs × heads × offsets numbers.
        max_offset: the largest offset.
        attention_mask: 0 at padding (None: where TransformerLens sees padding).

    Raises:
        Unsupported: the layer's scores are not bilinear in queries and keys.
        KeyError: a site is not decomposed.
        IndexError: there is no such subcomponent.
        ValueError: a subcomponent is of another site, the prompts do not fit, or the model has other weights.
    """
    max_offset = integer("max_offset", max_offset, minimum=0)
    attention = AttentionLayer(decomposition, model, layer)
    queries, keys = attention.sides(subcomponents)
    clean = attention.clean(prompts, attention_mask)
    kernel = attention.kernel(min(clean.tokens.shape[1], max_offset + 1))
    query_names, query_writes, queries = _with_bias(attention, attention.q, attention.query_writes, queries)
    key_names, key_writes, keys = _with_bias(attention, attention.k, attention.key_writes, keys)
    q_acts = attention.acts(attention.q, clean.inputs)[..., queries]
    k_acts = attention.acts(attention.k, clean.inputs)[..., keys]
    values, counts = [], []
    for offset, K in zip(kernel.offsets.tolist(), kernel.values, strict=True):
        together, count = mean_products(q_acts, k_acts, offset, clean.token_mask)
        values.append(together[..., None] * torch.einsum("qhd,de,khe->qkh", query_writes, K, key_writes))
        counts.append(count)
    counted = torch.tensor(counts, device=q_acts.device)
    return MeanStrengths(attention.index, query_names, key_names, kernel.offsets, counted, torch.stack(values, dim=-1))


def _with_bias(
    attention: AttentionLayer, site: Site, writes: Tensor, indices: list[int]
) -> tuple[tuple[str, ...], Tensor, list[int]]:
    """Names, write directions and columns of one side, the bias last."""
    names = tuple(str(Subcomponent(site.name, i)) for i in indices)
    if len(writes) > attention.decomposition.counts[site.name]:
        indices, names = [*indices, len(writes) - 1], (*names, BIAS)
    return names, writes[indices], indices
