"""The adapter for a model, and the table of what can be decomposed in it.

>>> adapter = adapt(model)                     # doctest: +SKIP
>>> adapter.sites["blocks.0.attn.W_Q"]         # doctest: +SKIP
Site(name='blocks.0.attn.W_Q', d_in=96, d_out=96, n_heads=4, d_head=24)
"""

from __future__ import annotations

import pandas as pd
from torch import nn

from tl_vpd.adapters.base import Adapter
from tl_vpd.adapters.bridge import BridgeAdapter
from tl_vpd.adapters.hooked_transformer import HookedTransformerAdapter
from tl_vpd.adapters.module import ModuleAdapter
from tl_vpd.adapters.versions import HookedRootModule, is_bridge, is_hooked_transformer


def adapt(model: nn.Module) -> Adapter:
    """The adapter for a model; raises TypeError where none knows its class, Unsupported where a flag is in the way."""
    if is_hooked_transformer(model):
        return HookedTransformerAdapter(model)
    if is_bridge(model):
        return BridgeAdapter(model)
    if isinstance(model, HookedRootModule):
        return ModuleAdapter(model)
    raise TypeError(
        f"A {type(model).__name__} cannot be decomposed. Pass a transformer_lens HookedTransformer or TransformerBridge, or a "
        "custom HookedRootModule with nn.Linear layers."
    )


def sites(model: nn.Module) -> pd.DataFrame:
    """A table of what can be decomposed in a model, and why the rest cannot.

    Columns: ``site``; ``d_in``, ``d_out``, ``rank``, ``heads`` (0 where there are none or nothing can be decomposed); ``refused``
    (the reason, or "").

    Raises:
        TypeError: no adapter knows the model's class.
        Unsupported: the model as a whole cannot be decomposed.
    """
    adapter = adapt(model)
    rows = [(s.name, s.d_in, s.d_out, s.rank, s.n_heads or 0, "") for s in adapter.sites.values()]
    rows += [(name, 0, 0, 0, 0, reason) for name, reason in adapter.refused.items()]
    return pd.DataFrame(rows, columns=["site", "d_in", "d_out", "rank", "heads", "refused"])
