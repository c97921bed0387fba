"""A model run with chosen pairs of subcomponents left out of its attention scores.

    score_h(t, t') ← score_h(t, t') − Σ_{(c,c')} m_c a_Q,c(t) · U^h_Q,cᵀ K_{t−t'} U^h_K,c' · m_c' a_K,c'(t')

Ablating a subcomponent removes it from every pair it is in; this removes single pairs. The hooks read activations and masks of
the running pass, so that they compose with masks, ablations and patches that come before them in the list.

    >>> with vpd.attach(model):                                                                           # doctest: +SKIP
    ...     hooks = pair_ablation_hooks(vpd, model, [("blocks.0.attn.W_Q:77", "blocks.0.attn.W_K:48")])
    ...     model.run_with_hooks(tokens, fwd_hooks=hooks)
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_vpd.adapters import Unsupported, adapt
from tl_vpd.analysis.attention.layer import BIAS, AttentionLayer, Pairs, pairs_of, with_one
from tl_vpd.analysis.attention.layer_scores import unmasked
from tl_vpd.analysis.attention.score_terms import between_writes, summed_strengths
from tl_vpd.checks import instance, integer, number
from tl_vpd.decomposition import Decomposition
from tl_vpd.hooks.ablations import FwdHooks, require_points


class PairAblation:
    """The hooks of one layer's pairs: they read the pairs' activations (``columns``) in a pass, and subtract ``amount`` of their
    products with ``by_offset`` where its scores pass.
    """

    def __init__(
        self,
        columns: tuple[list[int], list[int]],
        by_offset: Float[Tensor, "pair head offset"],
        offsets: Int[Tensor, " offset"],
        amount: float,
    ) -> None:
        self.by_offset, self.offsets, self.amount = by_offset, offsets, amount
        self.columns = dict(zip(("q", "k"), columns, strict=True))
        self._acts: dict[str, Tensor] = {}

    def acts(self, side: str, tensor: Float[Tensor, "batch pos C"], hook: Any) -> None:
        """On ``component_acts``: reads the pairs' activations, until the scores of this pass."""
        self._acts[side] = with_one(tensor)[..., self.columns[side]]

    def mask(self, side: str, tensor: Float[Tensor, "batch pos C"], hook: Any) -> None:
        """On ``mask``: multiplies the activations by the masks."""
        self._acts[side] = self._acts[side] * with_one(tensor)[..., self.columns[side]]

    def scores(self, tensor: Float[Tensor, "batch head query key"], hook: Any) -> Float[Tensor, "batch head query key"]:
        """On the scores: subtracts the pairs' summands. Raises RuntimeError where the hooks that read activations did not run,
        ValueError with a KV cache, or where the pass is longer than was prepared for.
        """
        if len(self._acts) < 2:
            raise RuntimeError(
                "Scores passed before the activations of their pairs were read: use every list of pair_ablation_hooks once in a "
                "run, whole, on the model its decomposition is attached to."
            )
        q, k = self._acts.pop("q"), self._acts.pop("k")
        if (q.shape[1], k.shape[1]) != tuple(tensor.shape[-2:]):
            raise ValueError(
                f"Scores are {tuple(tensor.shape[-2:])} (query, key) and this pass has {k.shape[1]} keys' activations: pairs "
                "cannot be left out with a KV cache; pass use_past_kv_cache=False."
            )
        beyond = unmasked(tensor).tril(-int(self.offsets[-1]) - 1)
        if bool(beyond.any()):
            raise ValueError(
                f"The prompt has {tensor.shape[-2]} tokens, the hooks were made for {int(self.offsets[-1]) + 1}: give "
                "pair_ablation_hooks a larger length."
            )
        strengths = summed_strengths(q, k, self.by_offset.to(q), self.offsets)
        return torch.where(unmasked(tensor), tensor - self.amount * strengths.to(tensor), tensor)


@torch.no_grad()
def pair_ablation_hooks(
    decomposition: Decomposition, model: nn.Module, pairs: Pairs, *, length: int | None = None, amount: float = 1.0
) -> FwdHooks:
    """``fwd_hooks`` that leave pairs out of attention scores; put them after hooks that change masks or activations.

    Args:
        decomposition: attached to the model.
        model: the target.
        pairs: a subcomponent of W_Q and one of W_K of the same block each (``"bias"`` for one of them: the bias of its side);
            blocks may differ from pair to pair.
        length: of the longest prompt they will run on (None: the model's context).
        amount: 1 leaves a pair out, 0.5 halves it, 2 reverses it.

    Raises:
        RuntimeError: the decomposition is not attached.
        KeyError: it is attached without ``component_acts`` and ``mask``, or a site is not decomposed.
        Unsupported: a layer's scores are not bilinear in queries and keys, or every head has an input to itself.
        ValueError: a pair is not one of W_Q and W_K of the same block, there are none, or the amount is not finite.
        IndexError: there is no such subcomponent.
    """
    instance("decomposition", decomposition, Decomposition)
    length = None if length is None else integer("length", length, minimum=1)
    amount, pairs = number("amount", amount), pairs_of(pairs)
    if not pairs:
        raise ValueError("pairs=[]: name at least one pair.")
    by_layer: dict[int, list[tuple[Any, Any]]] = defaultdict(list)
    for pair in pairs:
        by_layer[_layer_of(decomposition, pair)].append(pair)
    hooks: FwdHooks = []
    for layer, layer_pairs in by_layer.items():
        hooks += _layer_hooks(AttentionLayer(decomposition, model, layer), layer_pairs, length, amount)
    return hooks


def _layer_of(decomposition: Decomposition, pair: tuple[Any, Any]) -> int:
    """The block of a pair."""
    named = [member for member in pair if member != BIAS]
    if not named:
        raise ValueError("('bias', 'bias') does not say of which block: name a subcomponent in every pair.")
    layer = decomposition.sites[decomposition.subcomponent(named[0]).site].layer
    if layer is None:
        raise ValueError(f"{pair} is not of any block: a pair is a subcomponent of W_Q and one of W_K.")
    return layer


def _layer_hooks(layer: AttentionLayer, pairs: Pairs, length: int | None, amount: float) -> FwdHooks:
    members, sides = layer.pairs(pairs), {"q": layer.q, "k": layer.k}
    points = [(site.name, kind) for site in sides.values() for kind in ("component_acts", "mask")]
    require_points(layer.decomposition, "pair_ablation_hooks", points)
    if any(layer.adapter.layout(site.name).by_head for site in sides.values()):
        raise Unsupported(
            "Every head has an input to itself (use_split_qkv_input or use_attn_in): switch that off first."
        )
    n_ctx = adapt(layer.model).n_ctx
    kernel = layer.kernel(n_ctx if length is None else min(length, n_ctx))
    ablation = PairAblation(layer.columns(members), between_writes(layer, kernel, members), kernel.offsets, amount)
    hooks: FwdHooks = []
    for side, site in sides.items():
        hooks.append((site.hook_name("component_acts"), partial(ablation.acts, side)))
        hooks.append((site.hook_name("mask"), partial(ablation.mask, side)))
    return [*hooks, (layer.adapter.scores_hook(layer.index), ablation.scores)]
