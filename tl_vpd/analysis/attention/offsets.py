"""Attention by offset: how much a head pays, on average, to the token τ positions back; before and after an ablation.

    paid(h, τ) = E_t[ pattern_h(t, t − τ) ]          over real tokens t that have a real token τ positions before them

>>> ablate = ["blocks.0.attn.W_Q:77"]
>>> attention_by_offset(vpd, model, tokens, 0, ablate=ablate).to_pandas()                                 # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tl_vpd.adapters import Unsupported, adapt
from tl_vpd.analysis.attention.layer import pairs_of
from tl_vpd.analysis.attention.pair_ablation import pair_ablation_hooks
from tl_vpd.checks import instance, integer, sequence
from tl_vpd.decomposition import Decomposition
from tl_vpd.hooks import attachment_of
from tl_vpd.hooks.ablations import FwdHooks
from tl_vpd.printing import Printed
from tl_vpd.site import Subcomponent


def mean_by_offset(
    pattern: Float[Tensor, "batch head query key"],
    max_offset: int,
    token_mask: Bool[Tensor, "batch query"] | None = None,
) -> Float[Tensor, "head offset"]:
    """The mean attention paid at each offset ``query − key`` 0 … ``max_offset``; NaN at offsets without real tokens."""
    n = pattern.shape[-1]
    means = []
    for offset in range(min(max_offset, n - 1) + 1):
        paid = pattern.diagonal(-offset, dim1=-2, dim2=-1)  # [batch, head, query]
        both = torch.ones_like(paid[:, 0], dtype=torch.bool)
        if token_mask is not None:
            both = token_mask[:, offset:] & token_mask[:, : n - offset]
        means.append((paid * both[:, None]).sum((0, 2)) / both.sum())
    return torch.stack(means, dim=-1)


@dataclass(frozen=True)
class AttentionByOffset(Printed):
    """Mean attention by head and offset: of the model itself, and (where something was ablated) without it."""

    layer: int
    ablated: tuple[str, ...]
    before: Float[Tensor, "head offset"]
    after: Float[Tensor, "head offset"] | None

    def to_pandas(self) -> pd.DataFrame:
        """One row per head and offset: head, offset, before, and after and change if something was ablated."""
        heads, offsets = self.before.shape
        table = pd.DataFrame(
            {
                "head": [h for h in range(heads) for _ in range(offsets)],
                "offset": list(range(offsets)) * heads,
                "before": self.before.flatten().tolist(),
            }
        )
        if self.after is not None:
            table["after"] = self.after.flatten().tolist()
            table["change"] = table["after"] - table["before"]
        return table

    def top(self, k: int = 10) -> pd.DataFrame:
        """The ``k`` rows of the largest change, or of the most attention if nothing was ablated."""
        k, table = integer("k", k, minimum=0), self.to_pandas()
        column = "before" if self.after is None else "change"
        return table.loc[table[column].abs().nlargest(k).index].reset_index(drop=True)


@torch.no_grad()
def attention_by_offset(
    decomposition: Decomposition,
    model: nn.Module,
    prompts: Any,
    layer: int,
    *,
    ablate: Sequence[str | Subcomponent | tuple[str | Subcomponent, str | Subcomponent]] = (),
    max_offset: int = 16,
    attention_mask: Tensor | None = None,
) -> AttentionByOffset:
    """Mean attention of a layer's heads by offset, and again with subcomponents or pairs of them left out.

    Args:
        decomposition: of the model's weights.
        model: the target.
        prompts: a string, strings, or tokens ``[batch, pos]``.
        layer: the block's index.
        ablate: subcomponents that are ablated in the model, and pairs (of W_Q and W_K) that are left out of the scores.
        max_offset: the largest offset.
        attention_mask: 0 at padding (None: where TransformerLens sees padding).

    Raises:
        KeyError: a site is not decomposed.
        IndexError: there is no such subcomponent.
        ValueError: an offset, pair or prompt does not fit, the model has other weights, or another decomposition is attached.
    """
    instance("decomposition", decomposition, Decomposition)
    max_offset, adapter = integer("max_offset", max_offset, minimum=0), adapt(model)
    layer = integer("layer", layer, minimum=0, maximum=len(adapter.blocks()) - 1)
    ablate = [ablate] if isinstance(ablate, str | Subcomponent) else sequence("ablate", ablate)
    tokens = adapter.tokens(prompts)
    token_mask = adapter.padding(tokens, attention_mask)
    attached = attachment_of(decomposition, model)
    with decomposition.attach(model) if attached is None else nullcontext():

        def run(hooks: FwdHooks) -> Tensor:
            name = f"blocks.{layer}.attn.hook_pattern"
            patterns: list[Tensor] = []
            with model.hooks(fwd_hooks=[*hooks, (name, lambda pattern, hook: patterns.append(pattern.detach()))]):  # type: ignore[operator]
                adapter.run(tokens, token_mask)
            if not patterns:
                raise Unsupported(f"Block {layer} ran without passing its pattern through {name}.")
            return mean_by_offset(patterns[-1], max_offset, token_mask)

        before = run([])
        if not ablate:
            return AttentionByOffset(layer, (), before, None)
        pairs = pairs_of([entry for entry in ablate if isinstance(entry, tuple)])
        whole = [entry for entry in ablate if not isinstance(entry, tuple)]
        names = [*(str(decomposition.subcomponent(c)) for c in whole), *(f"{q} · {k}" for q, k in pairs)]
        hooks = decomposition.ablation_hooks(whole) if whole else []
        if pairs:
            hooks = hooks + pair_ablation_hooks(decomposition, model, pairs, length=tokens.shape[1])
        return AttentionByOffset(layer, tuple(names), before, run(hooks))
