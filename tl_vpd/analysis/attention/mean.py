"""What pairs add to scores on average, by how far back they look: static geometry weighed by how the two fire together.

    mean(c, c', h, τ) = E_t[ a_Q,c(t) a_K,c'(t − τ) ] · U^h_Q,cᵀ K_τ U^h_K,c'

over all tokens t of the prompts that have one τ places before them. Summed over pairs, with Δ and position terms, it is the mean
score at that offset. Softmax sees differences between keys only, so what makes a head look one token back is a term larger at
offset 1 than elsewhere: ``contrast`` subtracts a term's mean over the other offsets, each weighed by how often it occurs.
Biases take part as one more member of each side, written ``bias``, whose activation is 1.

    >>> found = mean_strengths(vpd, model, 1, tokens)                                                     # doctest: +SKIP
    >>> found.top(5, offset=1)                                                                            # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_vpd.analysis.attention.layer import BIAS, AttentionLayer, indices
from tl_vpd.site import Site, Subcomponent

if TYPE_CHECKING:
    from tl_vpd.decomposition import Decomposition


@dataclass(frozen=True)
class MeanStrengths:
    """Mean contributions to scores (scaled as the model scales them) of pairs by head and offset.

    ``queries`` and ``keys`` name subcomponents, and ``bias`` at the end where the site has one. ``counts`` says over how many
    pairs of tokens each offset's mean goes.
    """

    layer: int
    queries: tuple[str, ...]
    keys: tuple[str, ...]
    offsets: Int[Tensor, " offset"]
    counts: Float[Tensor, " offset"]
    values: Float[Tensor, "query_c key_c head offset"]

    def contrast(self, offset: int) -> Float[Tensor, "query_c key_c head"]:
        """The strength at an offset minus its mean over the others, weighed by ``counts``.

        Raises:
            IndexError: the offset does not occur.
        """
        at = self._place(offset)
        others = self.counts.clone()
        others[at] = 0
        return self.values[..., at] - self.values @ (others / others.sum().clamp(min=1))

    def _place(self, offset: int) -> int:
        found = (self.offsets == offset).nonzero().flatten().tolist()
        if not found or not self.counts[found[0]]:
            raise IndexError(
                f"Offset {offset} does not occur: offsets run from {int(self.offsets[0])} to {int(self.offsets[-1])}."
            )
        return found[0]

    def heads(self, query: str | Subcomponent, key: str | Subcomponent, *, offset: int) -> pd.DataFrame:
        """One row a head: strength, contrast, and the share of this pair's summed size of contrast that the head has.

        Raises:
            KeyError: the pair is not among these. IndexError: the offset does not occur.
        """
        i, j = _index(self.queries, query), _index(self.keys, key)
        contrast = self.contrast(offset)[i, j]
        return pd.DataFrame(
            {
                "head": range(len(contrast)),
                "strength": self.values[i, j, :, self._place(offset)].tolist(),
                "contrast": contrast.tolist(),
                "share": (contrast.abs() / contrast.abs().sum()).tolist(),
            }
        )

    def top(self, k: int = 10, *, offset: int = 1, head: int | None = None) -> pd.DataFrame:
        """The ``k`` pairs of largest contrast at an offset, summed over heads (or in one): query, key, contrast, heads.

        ``heads`` is over how many heads the pair is spread: ``(Σ_h x_h)² / Σ_h x_h²`` of the heads' positive contrasts x.
        """
        by_head = self.contrast(offset)
        total = by_head.sum(-1) if head is None else by_head[..., head]
        best = total.flatten().topk(min(k, total.numel())).indices
        query, key = (w.tolist() for w in torch.unravel_index(best, total.shape))
        own = by_head.flatten(0, 1)[best].clamp(min=0)
        spread = own.sum(-1).square() / own.square().sum(-1).clamp(min=1e-30)
        return pd.DataFrame(
            {
                "query": [self.queries[i] for i in query],
                "key": [self.keys[i] for i in key],
                "contrast": total.flatten()[best].tolist(),
                "heads": spread.tolist(),
            }
        )

    def to_pandas(self, *, offset: int) -> pd.DataFrame:
        """One row a pair and head at one offset: query, key, head, strength, contrast."""
        n_q, n_k, n_h, _ = self.values.shape
        return pd.DataFrame(
            {
                "query": [q for q in self.queries for _ in range(n_k * n_h)],
                "key": [k for k in self.keys for _ in range(n_h)] * n_q,
                "head": list(range(n_h)) * (n_q * n_k),
                "strength": self.values[..., self._place(offset)].flatten().tolist(),
                "contrast": self.contrast(offset).flatten().tolist(),
            }
        )


def _index(names: tuple[str, ...], name: str | Subcomponent) -> int:
    if str(name) not in names:
        raise KeyError(f"{name} is not among the {len(names)} that strengths were computed for.")
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
    layer: int,
    prompts: Any,
    *,
    queries: Sequence[str | Subcomponent | int] | None = None,
    keys: Sequence[str | Subcomponent | int] | None = None,
    max_offset: int = 16,
    attention_mask: Tensor | None = None,
) -> MeanStrengths:
    """Mean contributions of pairs to a layer's scores on prompts, for offsets up to ``max_offset``.

    Args:
        queries, keys: subcomponents of W_Q and W_K (None: all; pairs × heads × offsets numbers are then held).

    Raises:
        Unsupported: the layer's scores are not bilinear in queries and keys.
        KeyError, IndexError, ValueError: a block, subcomponent or prompt does not exist.
    """
    own = AttentionLayer(decomposition, model, layer)
    sides = (_side(own, own.q, own.query_writes, queries), _side(own, own.k, own.key_writes, keys))
    seen = own.seen(prompts, attention_mask)
    kernel = own.kernel(min(seen.tokens.shape[1], max_offset + 1))
    (q_names, q_writes, q_chosen), (k_names, k_writes, k_chosen) = sides
    q_acts, k_acts = own.acts(own.q, seen.inputs)[..., q_chosen], own.acts(own.k, seen.inputs)[..., k_chosen]
    values, counts = [], []
    for offset, K in zip(kernel.offsets.tolist(), kernel.values, strict=True):
        together, count = mean_products(q_acts, k_acts, offset, seen.token_mask)
        values.append(together[..., None] * torch.einsum("qhd,de,khe->qkh", q_writes, K, k_writes))
        counts.append(count)
    return MeanStrengths(
        layer, q_names, k_names, kernel.offsets, torch.tensor(counts).to(q_acts), torch.stack(values, dim=-1)
    )


def _side(
    own: AttentionLayer, site: Site, writes: Tensor, chosen: Sequence[str | Subcomponent | int] | None
) -> tuple[tuple[str, ...], Tensor, list[int]]:
    """Names, write directions and columns of one side, its bias last."""
    picked = indices(own.decomposition, site, chosen)
    names = tuple(str(Subcomponent(site.name, i)) for i in picked)
    if len(writes) > own.decomposition.counts[site.name]:
        picked, names = [*picked, len(writes) - 1], (*names, BIAS)
    return names, writes[picked], picked
