"""A model run with chosen pairs of subcomponents left out of its attention scores.

    score_h(t, t') ← score_h(t, t') − Σ_{(c,c')} m_c a_Q,c(t) · U^h_Q,cᵀ K_{t−t'} U^h_K,c' · m_c' a_K,c'(t')

Ablating a subcomponent takes it out of every pair it is in; this takes out single pairs. The hooks read activations and masks of
the running pass, so that they compose with masks, ablations and patches that come before them in the list.

    >>> hooks = pair_ablation_hooks(vpd, model, [("blocks.0.attn.W_Q:77", "blocks.0.attn.W_K:48")])       # doctest: +SKIP
    >>> with vpd.attach(model):                                                                           # doctest: +SKIP
    ...     model.run_with_hooks(tokens, fwd_hooks=hooks)
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_vpd.adapters import Unsupported, adapt
from tl_vpd.analysis.attention.kernel import unmasked
from tl_vpd.analysis.attention.layer import BIAS, AttentionLayer, Pairs, with_one
from tl_vpd.analysis.attention.score_terms import between_writes, pair_strengths
from tl_vpd.hooks.ablations import FwdHooks, require_points
from tl_vpd.site import Subcomponent

if TYPE_CHECKING:
    from tl_vpd.decomposition import Decomposition


class PairAblation:
    """The hooks of one layer's pairs: what a pass shows of their activations, subtracted where its scores pass."""

    def __init__(
        self,
        columns: tuple[list[int], list[int]],
        by_offset: Float[Tensor, "pair head offset"],
        offsets: Int[Tensor, " offset"],
        amount: float,
    ) -> None:
        self.by_offset, self.offsets, self.amount = by_offset, offsets, amount
        self.columns = dict(zip(("q", "k"), columns, strict=True))
        self._held: dict[str, Tensor] = {}

    def acts(self, side: str, tensor: Float[Tensor, "batch pos C"], hook: Any) -> None:
        """On ``component_acts``: notes the pairs' activations."""
        self._held[side] = with_one(tensor)[..., self.columns[side]]

    def mask(self, side: str, tensor: Float[Tensor, "batch pos C"], hook: Any) -> None:
        """On ``mask``: multiplies the masks in."""
        self._held[side] = self._held[side] * with_one(tensor)[..., self.columns[side]]

    def scores(self, tensor: Float[Tensor, "batch head query key"], hook: Any) -> Float[Tensor, "batch head query key"]:
        """On the scores: takes the pairs' summands out.

        Raises:
            RuntimeError: the hooks that read activations did not run.
            ValueError: the pass is of another length than the pairs' activations (a KV cache), or longer than was prepared for.
        """
        if len(self._held) < 2:
            raise RuntimeError(
                "Scores passed before the activations of their pairs were seen: use every list of pair_ablation_hooks once in a "
                "run, whole, on the model its decomposition is attached to."
            )
        q, k = self._held.pop("q"), self._held.pop("k")
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
        taken = pair_strengths(q, k, self.by_offset.to(q), self.offsets, summed=True)
        return torch.where(unmasked(tensor), tensor - self.amount * taken.to(tensor), tensor)


@torch.no_grad()
def pair_ablation_hooks(
    decomposition: Decomposition, model: nn.Module, pairs: Pairs, *, length: int | None = None, amount: float = 1.0
) -> FwdHooks:
    """``fwd_hooks`` that leave pairs out of attention scores; put them behind hooks that change masks or activations.

    Args:
        pairs: a subcomponent of W_Q and one of W_K of the same block each (``"bias"`` for one of them: the bias of its side);
            blocks may differ from pair to pair.
        length: of the longest prompt they will run on (None: the model's context).
        amount: 1 leaves a pair out, 0.5 halves it, 2 reverses it.

    Raises:
        RuntimeError, KeyError: the decomposition is not attached, or without ``component_acts`` and ``mask``.
        Unsupported: a layer's scores are not bilinear in queries and keys, or the flags give every head its own input.
        ValueError, IndexError: a pair is none, or does not exist.
    """
    n_ctx = adapt(model).n_ctx
    by_layer: dict[int | None, list[tuple[str | Subcomponent, str | Subcomponent]]] = defaultdict(list)
    for pair in pairs:
        named = [member for member in pair if member != BIAS]
        if not named:
            raise ValueError("('bias', 'bias') does not say of which block: a pair needs a subcomponent here.")
        by_layer[decomposition.sites[decomposition.subcomponent(named[0]).site].layer].append(pair)
    hooks: FwdHooks = []
    for index, given in by_layer.items():
        if index is None:
            raise ValueError(f"{given[0]} is of no block.")
        layer = AttentionLayer(decomposition, model, index)
        chosen = layer.pairs(given)
        sides = {"q": layer.q, "k": layer.k}
        require_points(
            decomposition,
            "pair_ablation_hooks",
            [(site.name, kind) for site in sides.values() for kind in ("component_acts", "mask")],
        )
        if any(layer.adapter.layout(site.name).by_head for site in sides.values()):
            raise Unsupported(
                "Every head has its own input (use_split_qkv_input or use_attn_in): switch that off first."
            )
        kernel = layer.kernel(n_ctx if length is None else min(length, n_ctx))
        own = PairAblation(layer.columns(chosen), between_writes(layer, kernel, chosen), kernel.offsets, amount)
        for side, site in sides.items():
            hooks.append((site.hook_name("component_acts"), partial(own.acts, side)))
            hooks.append((site.hook_name("mask"), partial(own.mask, side)))
        hooks.append((layer.adapter.scores_hook(index), own.scores))
    return hooks
