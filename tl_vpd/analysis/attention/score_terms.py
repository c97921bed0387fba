"""Attention scores as a sum over pairs of subcomponents.

    score_h(t, t') = Σ_{c,c'} a_Q,c(t) · U^h_Q,cᵀ K_{t−t'} U^h_K,c' · a_K,c'(t')  +  Δ's terms  +  biases' terms  +  b_h(t, t')

K is the layer's own kernel (rotation over scale, ``kernel``), b what does not depend on queries and keys (ALiBi, masks). The four
parts sum to the scores the model computes, and every pair is one summand of the first.

    >>> terms = score_terms(vpd, model, tokens, 1, [("blocks.1.attn.W_Q:3", "blocks.1.attn.W_K:5")])      # doctest: +SKIP
    >>> terms.strengths.shape                                                                             # doctest: +SKIP
    torch.Size([1, 2, 4, 16, 16])

Left out: which subcomponent a residual component reached the pair by; that is what attribution graphs are for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_vpd.adapters import Unsupported
from tl_vpd.analysis.attention.kernel import TOLERANCE, ScoreKernel, scores_of, toeplitz, unmasked
from tl_vpd.analysis.attention.layer import AttentionLayer, Pair, Pairs, Seen

if TYPE_CHECKING:
    from tl_vpd.decomposition import Decomposition


@dataclass(frozen=True)
class ScoreTerms:
    """Attention scores of one layer and what they are the sum of, all scaled as the model scales them.

    ``scores = subcomponents + delta + bias + position``; masked places hold the model's own −∞ (or lowest number) in ``scores``
    and ``position`` and 0 in the others. ``strengths[i]`` is the summand of ``pairs[i]`` in ``subcomponents`` (in ``bias``, where
    the bias is one of the pair).
    """

    layer: int
    tokens: Int[Tensor, "batch pos"]
    scores: Float[Tensor, "batch head query key"]
    subcomponents: Float[Tensor, "batch head query key"]
    delta: Float[Tensor, "batch head query key"]
    bias: Float[Tensor, "batch head query key"]
    position: Float[Tensor, "batch head query key"]
    pairs: tuple[Pair, ...]
    strengths: Float[Tensor, "pair batch head query key"]

    @property
    def seen(self) -> Bool[Tensor, "batch head query key"]:
        """Where the layer attends at all."""
        return unmasked(self.scores)

    def without(self) -> Float[Tensor, "batch head query key"]:
        """The scores with the chosen pairs left out."""
        return self.scores - self.strengths.sum(0)

    def only(self) -> Float[Tensor, "batch head query key"]:
        """The scores of the chosen pairs alone, with what does not depend on queries and keys."""
        return self.strengths.sum(0) + self.position

    def to_pandas(self) -> pd.DataFrame:
        """One row a term: the mean over unmasked places of its size, and the share of the scores' spread over keys it makes.

        The share is the slope of the term on the scores, both centred over each query's keys (softmax sees nothing else); the
        shares of the four parts sum to 1.
        """
        seen = self.seen
        centred = _centred(self.scores, seen)
        rows = []
        named = {"subcomponents": self.subcomponents, "delta": self.delta, "bias": self.bias, "position": self.position}
        for i, (q, k) in enumerate(self.pairs):
            named[f"{q} · {k}"] = self.strengths[i]
        for name, term in named.items():
            own = _centred(term, seen)
            share = float((own * centred).sum() / centred.square().sum())
            rows.append((name, float(term[seen].abs().mean()), share))
        return pd.DataFrame(rows, columns=["term", "mean_size", "share"])

    def top(self, k: int = 10) -> pd.DataFrame:
        """The ``k`` strongest summands of the chosen pairs: both subcomponents, batch, head, query, key, strength, score."""
        flat = self.strengths.flatten()
        best = flat.abs().topk(min(k, flat.numel())).indices
        pair, batch, head, query, key = (w.tolist() for w in torch.unravel_index(best, self.strengths.shape))
        return pd.DataFrame(
            {
                "query_subcomponent": [str(self.pairs[i][0]) for i in pair],
                "key_subcomponent": [str(self.pairs[i][1]) for i in pair],
                "batch": batch,
                "head": head,
                "query": query,
                "key": key,
                "strength": flat[best].tolist(),
                "score": self.scores[batch, head, query, key].tolist(),
            }
        )


def pattern_of(scores: Float[Tensor, "*rest query key"]) -> Float[Tensor, "*rest query key"]:
    """Softmax over keys; 0 for queries that see nothing. Layers with attention sinks divide by more: read their hook_pattern."""
    return scores.softmax(-1).nan_to_num(0.0)


def _centred(x: Float[Tensor, "*rest key"], seen: Bool[Tensor, "*rest key"]) -> Float[Tensor, "*rest key"]:
    """Over each query's keys, masked ones at 0."""
    own = x.masked_fill(~seen, 0)
    return (own - own.sum(-1, keepdim=True) / seen.sum(-1, keepdim=True).clamp(min=1)).masked_fill(~seen, 0)


def pair_strengths(
    acts_q: Float[Tensor, "batch query pair"],
    acts_k: Float[Tensor, "batch key pair"],
    by_offset: Float[Tensor, "pair head offset"],
    offsets: Int[Tensor, " offset"],
    *,
    summed: bool = False,
) -> Float[Tensor, "*pair batch head query key"]:
    """``a_Q,c(t) S_h(t−t') a_K,c'(t')`` for each pair (or summed over them), S from ``by_offset``; 0 beyond the offsets."""
    between = toeplitz(by_offset, offsets, acts_q.shape[1], acts_k.shape[1])
    if summed:
        out = acts_q.new_zeros(acts_q.shape[0], *between.shape[1:])
        for pair, own in enumerate(between):
            out += acts_q[:, None, :, None, pair] * own * acts_k[:, None, None, :, pair]
        return out
    return torch.einsum("bqp,phqk,bkp->pbhqk", acts_q, between, acts_k)


def between_writes(layer: AttentionLayer, kernel: ScoreKernel, pairs: list[Pair]) -> Float[Tensor, "pair head offset"]:
    """``U^h_Q,cᵀ K_τ U^h_K,c'`` of each pair."""
    of_q, of_k = layer.columns(pairs)
    q, k = layer.query_writes[of_q], layer.key_writes[of_k]
    return torch.einsum("phd,ode,phe->pho", q, kernel.values, k)


@torch.no_grad()
def score_terms(
    decomposition: Decomposition,
    model: nn.Module,
    prompts: Any,
    layer: int,
    pairs: Pairs = (),
    *,
    attention_mask: Tensor | None = None,
) -> ScoreTerms:
    """A layer's scores on prompts, and what they are the sum of.

    Args:
        prompts: a string, strings, or tokens ``[batch, pos]``.
        pairs: whose summands to hold, ``[pair, batch, head, query, key]``; ``"bias"`` may stand for a subcomponent.
        attention_mask: 0 at padding (None: found as TransformerLens finds it).

    Raises:
        Unsupported: the scores are not bilinear in queries and keys (qk-norm, softcap: by name).
        KeyError, IndexError, ValueError: a block, site, pair or prompt does not exist.
    """
    own = AttentionLayer(decomposition, model, layer)
    chosen = own.pairs(pairs)
    seen = own.seen(prompts, attention_mask)
    kernel = own.kernel(seen.tokens.shape[1])
    parts = {"q": _parts(own, "q", seen), "k": _parts(own, "k", seen)}

    def product(q: Tensor, k: Tensor) -> Tensor:
        return kernel.scores(q, k)

    (q_sub, q_delta, q_bias), (k_sub, k_delta, k_bias) = parts["q"], parts["k"]
    subcomponents = product(q_sub, k_sub)
    # (sub + Δ + b)(sub + Δ + b): Δ's part is whatever has a Δ in it, the biases' what is left.
    delta = product(q_delta, k_sub + k_delta + k_bias) + product(q_sub + q_bias, k_delta)
    bias = product(q_bias, k_sub + k_bias) + product(q_sub, k_bias)
    zero = torch.zeros_like(q_sub)
    position = scores_of(own.adapter, layer, zero, zero[:, :, :1], seen.tokens, seen.token_mask)
    scores = seen.scores
    if seen.token_mask is not None:
        # Queries at padding see nothing: what a model computes there depends on the side that is padded.
        padding = ~seen.token_mask[:, None, :, None]
        scores, position = (t.masked_fill(padding, -torch.inf) for t in (scores, position))
    visible = unmasked(scores)
    subcomponents, delta, bias = (t.masked_fill(~visible, 0) for t in (subcomponents, delta, bias))
    _check(scores, subcomponents + delta + bias + position, visible, layer)
    if chosen:
        of_q, of_k = own.columns(chosen)
        acts_q, acts_k = own.acts(own.q, seen.inputs)[..., of_q], own.acts(own.k, seen.inputs)[..., of_k]
        strengths = pair_strengths(acts_q, acts_k, between_writes(own, kernel, chosen), kernel.offsets)
        strengths = strengths.masked_fill(~visible, 0)
    else:
        strengths = scores.new_zeros(0, *scores.shape)
    return ScoreTerms(layer, seen.tokens, scores, subcomponents, delta, bias, position, tuple(chosen), strengths)


def _parts(layer: AttentionLayer, which: str, seen: Seen) -> tuple[Tensor, Tensor, Tensor]:
    """Queries or keys as what the subcomponents, Δ and the bias put out, ``[batch, pos, head, d_head]`` each."""
    site, writes = (layer.q, layer.query_writes) if which == "q" else (layer.k, layer.key_writes)
    x = seen.inputs[site.name]
    whole = layer.by_head(x @ layer.adapter.weight(site.name), site)
    C = layer.decomposition.counts[site.name]
    sub = torch.einsum("btc,chd->bthd", layer.acts(site, seen.inputs)[..., :C], writes[:C])
    return sub, whole - sub, writes[C:].sum(0).expand_as(whole)


def _check(scores: Tensor, total: Tensor, visible: Tensor, layer: int) -> None:
    largest = max(float(scores[visible].abs().max()), 1.0)
    off = float((scores - total)[visible].abs().max()) / largest
    if not off < (TOLERANCE if scores.dtype in (torch.float32, torch.float64) else 30 * TOLERANCE):
        raise Unsupported(
            f"The terms sum to other scores than block {layer} shows, by {off:.2g} of the largest: its queries or keys are "
            "changed on the way (per-head inputs, a permanent hook)."
        )
