"""What carries edges between heads and MLPs: TransformerLens's hooks on each head's result and on each reader's input.

They run only under flags (``use_attn_result``, ``use_split_qkv_input``, ``use_hook_mlp_in``), which ``edge_hooks`` switches on
for a while. A head's keys and values have an input per query head only where K and V are not grouped; a HookedTransformer can
ungroup them.
"""

from __future__ import annotations

from functools import partial

from tl_vpd.adapters.base import Adapter
from tl_vpd.adapters.changes import Later, change
from tl_vpd.adapters.taps import Unsupported


@change
def edge_hooks(undo: Later, adapter: Adapter) -> None:
    """Inside, heads' results and the inputs of queries, keys, values and MLPs pass hooks; flags are restored afterwards. Raises
    Unsupported where a model has no such hooks, or cannot ungroup its keys and values.
    """
    cfg = adapter.model.cfg
    grouped = (getattr(cfg, "n_key_value_heads", None) or cfg.n_heads) != cfg.n_heads
    # use_attn_in excludes use_split_qkv_input, so it goes first and comes back last.
    wanted = {"use_attn_in": False, "use_split_qkv_input": True, "use_attn_result": True}
    if grouped:
        wanted["ungroup_grouped_query_attention"] = True
    if not cfg.attn_only:
        wanted["use_hook_mlp_in"] = True
    for flag, value in wanted.items():
        before = bool(getattr(cfg, flag, False))
        if before is not value:
            switch = getattr(adapter.model, f"set_{flag}", None)
            if switch is None:
                raise Unsupported(
                    f"A {type(adapter.model).__name__} with cfg.{flag}={before} has no hook for every edge: audit its nodes."
                )
            undo(partial(switch, before))
            try:
                switch(value)
            except (ValueError, NotImplementedError, RuntimeError) as error:
                raise Unsupported(f"cfg.{flag} cannot be {value} on this model, and edges need it: {error}") from error


def mlp_reads_heads(adapter: Adapter) -> bool:
    """Whether a block's MLP reads what the heads of its block write."""
    return not getattr(adapter.model.cfg, "parallel_attn_mlp", False)
