"""Attention scores as a sum over pairs of subcomponents.

    score_h(t, t') = Σ_{c,c'} a_Q,c(t) · U^h_Q,cᵀ K_{t−t'} U^h_K,c' · a_K,c'(t')  +  Δ's terms  +  biases' terms  +  b_h(t, t')

K is the layer's kernel (rotation over scale, ``kernel``), b what does not depend on queries and keys (ALiBi, masks). The four
terms sum to the scores the model computes, and every pair is one summand of the first.

    >>> terms = score_terms(vpd, model, tokens, 1, [("blocks.1.attn.W_Q:3", "blocks.1.attn.W_K:5")])      # doctest: +SKIP
    >>> terms.strengths.shape                                                                             # doctest: +SKIP
    torch.Size([1, 2, 4, 16, 16])

Left out: which subcomponent a residual component reached the pair by; that is what attribution graphs are for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_vpd.adapters import Unsupported
from tl_vpd.analysis.attention.kernel import ScoreKernel, toeplitz
from tl_vpd.analysis.attention.layer import AttentionLayer, AttentionPass, Pair, Pairs
from tl_vpd.analysis.attention.layer_scores import allowed_error, scores_of, unmasked
from tl_vpd.checks import integer
from tl_vpd.decomposition import Decomposition
from tl_vpd.printing import Printed
from tl_vpd.site import Site


@dataclass(frozen=True)
class ScoreTerms(Printed):
    """Attention scores of one layer and what they are the sum of, all scaled as the model scales them.

    ``scores = subcomponents + delta + bias + position``. Where scores are masked, ``scores`` and ``position`` hold the model's −∞
    (or lowest number) and the others 0.

    Attributes:
        layer: the block's index.
        tokens: the prompts.
        scores: of the model.
        subcomponents: the sum over all pairs.
        delta: every product with a Δ in it.
        bias: every other product with a bias in it.
        position: what does not depend on queries and keys.
        pairs: the chosen pairs.
        strengths: the summand of each pair in ``subcomponents`` (in ``bias``, where the bias is one of the pair).
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
    def visible(self) -> Bool[Tensor, "batch head query key"]:
        """Where the layer attends at all."""
        return unmasked(self.scores)

    def without(self) -> Float[Tensor, "batch head query key"]:
        """The scores with the chosen pairs left out."""
        return self.scores - self.strengths.sum(0)

    def only(self) -> Float[Tensor, "batch head query key"]:
        """The scores of the chosen pairs and of what does not depend on queries and keys."""
        return self.strengths.sum(0) + self.position

    def to_pandas(self) -> pd.DataFrame:
        """One row per term: the mean over visible entries of its size, and the fraction of the scores' spread over keys it makes.

        The fraction is the slope of the term on the scores, both centred over each query's keys (softmax depends on nothing
        else); those of the four terms sum to 1 (NaN where no query sees two keys of different scores).
        """
        visible = self.visible
        scores = _centred(self.scores, visible)
        terms = {"subcomponents": self.subcomponents, "delta": self.delta, "bias": self.bias, "position": self.position}
        terms |= {f"{q} · {k}": self.strengths[i] for i, (q, k) in enumerate(self.pairs)}
        rows = []
        for name, term in terms.items():
            fraction = float((_centred(term, visible) * scores).sum() / scores.square().sum())
            rows.append((name, float(term[visible].abs().mean()), fraction))
        return pd.DataFrame(rows, columns=["term", "mean_size", "fraction"])

    def top(self, k: int = 10) -> pd.DataFrame:
        """The ``k`` strongest summands of the chosen pairs: both subcomponents, batch, head, query, key, strength, score."""
        k, flat = integer("k", k, minimum=0), self.strengths.flatten()
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


def _centred(x: Float[Tensor, "*rest key"], visible: Bool[Tensor, "*rest key"]) -> Float[Tensor, "*rest key"]:
    """Over each query's keys, masked ones at 0."""
    x = x.masked_fill(~visible, 0)
    mean = x.sum(-1, keepdim=True) / visible.sum(-1, keepdim=True).clamp(min=1)
    return (x - mean).masked_fill(~visible, 0)


def pair_strengths(
    acts_q: Float[Tensor, "batch query pair"],
    acts_k: Float[Tensor, "batch key pair"],
    by_offset: Float[Tensor, "pair head offset"],
    offsets: Int[Tensor, " offset"],
) -> Float[Tensor, "pair batch head query key"]:
    """``a_Q,c(t) S_h(t−t') a_K,c'(t')`` for each pair, S from ``by_offset``; 0 beyond the offsets."""
    between = toeplitz(by_offset, offsets, acts_q.shape[1], acts_k.shape[1])
    return torch.einsum("bqp,phqk,bkp->pbhqk", acts_q, between, acts_k)


def summed_strengths(
    acts_q: Float[Tensor, "batch query pair"],
    acts_k: Float[Tensor, "batch key pair"],
    by_offset: Float[Tensor, "pair head offset"],
    offsets: Int[Tensor, " offset"],
) -> Float[Tensor, "batch head query key"]:
    """``pair_strengths`` summed over the pairs, one pair at a time."""
    n_q, n_k = acts_q.shape[1], acts_k.shape[1]
    total = acts_q.new_zeros(acts_q.shape[0], by_offset.shape[1], n_q, n_k)
    for pair, strength in enumerate(by_offset):
        between = toeplitz(strength, offsets, n_q, n_k)
        total += acts_q[:, None, :, None, pair] * between * acts_k[:, None, None, :, pair]
    return total


def between_writes(layer: AttentionLayer, kernel: ScoreKernel, pairs: list[Pair]) -> Float[Tensor, "pair head offset"]:
    """``U^h_Q,cᵀ K_τ U^h_K,c'`` of each pair."""
    queries, keys = layer.columns(pairs)
    return torch.einsum("phd,ode,phe->pho", layer.query_writes[queries], kernel.values, layer.key_writes[keys])


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
        decomposition: with W_Q and W_K of the block.
        model: the target.
        prompts: a string, strings, or tokens ``[batch, pos]``.
        layer: the block's index.
        pairs: whose summands the result holds, ``[pair, batch, head, query, key]``; ``"bias"`` may stand for a subcomponent.
        attention_mask: 0 at padding (None: where TransformerLens sees padding).

    Raises:
        Unsupported: the scores are not bilinear in queries and keys (qk-norm, softcap: by name).
        KeyError: a block or site is not decomposed.
        IndexError: there is no such subcomponent.
        ValueError: a pair or prompt does not fit, or the model has other weights.
    """
    attention = AttentionLayer(decomposition, model, layer)
    members = attention.pairs(pairs)
    clean = attention.clean(prompts, attention_mask)
    kernel = attention.kernel(clean.tokens.shape[1])
    q_sub, q_delta, q_bias = _outputs(attention, attention.q, attention.query_writes, clean)
    k_sub, k_delta, k_bias = _outputs(attention, attention.k, attention.key_writes, clean)
    subcomponents = kernel.scores(q_sub, k_sub)
    # (sub + Δ + b)(sub + Δ + b): Δ's term is every product with a Δ in it, the biases' what is left.
    delta = kernel.scores(q_delta, k_sub + k_delta + k_bias) + kernel.scores(q_sub + q_bias, k_delta)
    bias = kernel.scores(q_bias, k_sub + k_bias) + kernel.scores(q_sub, k_bias)
    zero = torch.zeros_like(q_sub)
    position = scores_of(attention.adapter, layer, zero, zero[:, :, :1], clean.tokens, clean.token_mask)
    scores = clean.scores
    if clean.token_mask is not None:
        # Queries at padding see nothing: what a model computes there depends on the side that is padded.
        padding = ~clean.token_mask[:, None, :, None]
        scores, position = (t.masked_fill(padding, -torch.inf) for t in (scores, position))
    visible = unmasked(scores)
    subcomponents, delta, bias = (t.masked_fill(~visible, 0) for t in (subcomponents, delta, bias))
    _check(scores, subcomponents + delta + bias + position, visible, layer)
    strengths = scores.new_zeros(0, *scores.shape)
    if members:
        queries, keys = attention.columns(members)
        acts_q = attention.acts(attention.q, clean.inputs)[..., queries]
        acts_k = attention.acts(attention.k, clean.inputs)[..., keys]
        strengths = pair_strengths(acts_q, acts_k, between_writes(attention, kernel, members), kernel.offsets)
        strengths = strengths.masked_fill(~visible, 0)
    return ScoreTerms(
        attention.index, clean.tokens, scores, subcomponents, delta, bias, position, tuple(members), strengths
    )


def _outputs(
    layer: AttentionLayer, site: Site, writes: Float[Tensor, "C head d_head"], clean: AttentionPass
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries or keys as the outputs of the subcomponents, of Δ and of the bias, ``[batch, pos, head, d_head]`` each."""
    x, C = clean.inputs[site.name], layer.decomposition.counts[site.name]
    whole = layer.by_head(x @ layer.adapter.weight(site.name), site)
    subcomponents = torch.einsum("btc,chd->bthd", layer.acts(site, clean.inputs)[..., :C], writes[:C])
    return subcomponents, whole - subcomponents, writes[C:].sum(0).expand_as(whole)


def _check(scores: Tensor, total: Tensor, visible: Tensor, layer: int) -> None:
    largest = max(float(scores[visible].abs().max()), 1.0)
    error = float((scores - total)[visible].abs().max()) / largest
    if not error < allowed_error(scores.dtype):
        raise Unsupported(
            f"The terms sum to other scores than block {layer} shows, by {error:.2g} of the largest: its queries or keys are "
            "changed on the way (per-head inputs, a permanent hook)."
        )
