"""Which attention layers have scores that are sums of products of a query's and a key's terms.

    score(t, t') = q(t)ᵀ R_{t−t'} k(t') / scale + what does not depend on q and k

holds with rotary, learned and no positions, grouped queries, ALiBi, relative biases and windows. It does not hold where queries
and keys are normalised or clipped, or scores are capped: then no sum over pairs equals the score.
"""

from __future__ import annotations

from tl_vpd.adapters.taps import Unsupported


def bilinear_scores(layer: int, *, qk_norm: bool, softcap: float | None, clip: float | None) -> str:
    """The name of the hook on a layer's scores; raises Unsupported where q and k are normalised or clipped, or scores capped."""
    reasons = {
        "its queries and keys are normalised (qk-norm)": qk_norm,
        f"its scores are capped at {softcap} (softcap)": bool(softcap and softcap > 0),
        f"its queries and keys are clipped at {clip} (clip_qkv)": clip is not None,
    }
    if why := [reason for reason, holds in reasons.items() if holds]:
        raise Unsupported(
            f"Attention of block {layer} is not a sum over pairs of subcomponents: {' and '.join(why)}. Norms, OV overlap, "
            "attention by offset and ablations still work."
        )
    return f"blocks.{layer}.attn.hook_attn_scores"
