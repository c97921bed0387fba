"""Models whose flags give Q, K and V an input for every head or W_O a result for every head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.tiny import tiny_model
from tl_vpd.adapters.versions import HookedTransformer

GROUPED = dict(normalization_type="RMS", gated_mlp=True, act_fn="silu", n_heads=4, n_key_value_heads=2)

LAYOUTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "result": ({}, ("use_attn_result",)),
    "attn in": ({}, ("use_attn_in",)),
    "result, split, mlp in": ({}, ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in")),
    "grouped, result, split": (GROUPED, ("use_attn_result", "use_split_qkv_input")),
    "ungrouped": (GROUPED, ("ungroup_grouped_query_attention",)),
    "ungrouped, split": (GROUPED, ("ungroup_grouped_query_attention", "use_split_qkv_input")),
}
"""Architecture and the flags that are on."""


def set_flags(model: HookedTransformer, flags: Sequence[str], on: bool = True) -> None:
    """Switches flags by the model's setters."""
    for flag in flags:
        getattr(model, f"set_{flag}")(on)


def flagged(name: str) -> tuple[HookedTransformer, tuple[str, ...]]:
    """A model with a layout's flags off, and the flags."""
    architecture, flags = LAYOUTS[name]
    return tiny_model(**architecture), flags
