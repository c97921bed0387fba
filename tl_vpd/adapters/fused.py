"""A HookedTransformer's attention in one call, where no hook sees a difference.

TransformerLens forms scores and pattern as tensors, so that they can be hooked. Where neither is hooked and the layer computes
only ``softmax(Q Kᵀ / scale + causal mask) V``, PyTorch's ``scaled_dot_product_attention`` gives the same z to rounding, in fewer
operations and without a tensor of ``[batch, head, pos, pos]``. Inside a context the layer's methods are replaced: scores and
pattern become a single number, and z is computed from the queries and keys that were set aside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tl_vpd.adapters.changes import Later, change
from tl_vpd.adapters.taps import put_method

METHODS = ("calculate_attention_scores", "apply_causal_mask", "calculate_z_scores")


def can_be_fused(attn: Any) -> bool:
    """Whether an attention layer is plain softmax attention over all positions, with no hook on scores or pattern."""
    cfg = attn.cfg
    plain = (
        cfg.positional_embedding_type not in ("alibi", "relative_positional_bias")
        and not getattr(cfg, "attn_scores_soft_cap", 0.0) > 0
        and not getattr(cfg, "use_attention_sinks", False)
        and getattr(attn, "attn_type", "global") == "global"
        and all(hasattr(attn, name) and name not in attn.__dict__ for name in METHODS)
    )
    points = (attn.hook_attn_scores, attn.hook_pattern)
    return plain and not any(point._forward_hooks or point._backward_hooks for point in points)


@change
def fused_attention(undo: Later, layers: Iterable[Any]) -> None:
    """Inside, those layers that can be are computed in one call. The model must run without padding or a KV cache."""
    for attn in [attn for attn in layers if can_be_fused(attn)]:
        for name, method in zip(METHODS, _fused(attn), strict=True):
            put_method(undo, attn, name, method)


def _fused(attn: Any) -> tuple[Callable[..., Tensor], ...]:
    """An attention layer's ``METHODS`` in one call."""
    aside: list[tuple[Tensor, Tensor]] = []
    causal = (getattr(attn, "_attention_dir_override", None) or attn.cfg.attention_dir) == "causal"

    def scores(q: Float[Tensor, "batch pos head d_head"], k: Float[Tensor, "batch pos kv_head d_head"]) -> Tensor:
        aside.append((q, k))
        return q.new_zeros(1, 1, 1, 1)

    def mask(attn_scores: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        return attn_scores

    def z(v: Float[Tensor, "batch pos kv_head d_head"], pattern: Tensor) -> Float[Tensor, "batch pos head d_head"]:
        q, k = aside.pop()
        q, k, v = (_all_heads(t, q.shape[2]).transpose(1, 2).to(v.dtype) for t in (q, k, v))
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=1 / float(attn.attn_scale))
        return attn.hook_z(heads.transpose(1, 2))

    return scores, mask, z


def _all_heads(t: Tensor, heads: int) -> Tensor:
    return t if t.shape[2] == heads else t.repeat_interleave(heads // t.shape[2], dim=2)
