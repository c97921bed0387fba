"""Which V subcomponents go with which K ones, and with which heads.

At the source token a key says *whether* it is read and a value *what* is read. Where K's c' is important, how often is V's c?

    P(V_c | K_c') = #(g_V,c > θ and g_K,c' > θ) / #(g_K,c' > θ)          and P(K_c' | V_c) likewise

A subcomponent's alignment with a head is how much of it passes through the head's W_OV:

    ‖v_c W_OV^h‖ ‖u_c‖   (V: what it reads)          ‖W_OV^h u_cᵀ‖ ‖v_c‖   (O: what it writes)

>>> value_given_key(vpd, model, tokens, 1).top(5)                                                         # doctest: +SKIP
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_vpd.adapters import adapt
from tl_vpd.analysis.attention.layer import attention_site
from tl_vpd.analysis.attention.norms import HeadNorms
from tl_vpd.analysis.attention.ov import ov_factors
from tl_vpd.checks import check_threshold, integer
from tl_vpd.decomposition import Decomposition
from tl_vpd.forward.target_check import check_target
from tl_vpd.hooks.importances import causal_importances
from tl_vpd.printing import Printed
from tl_vpd.site import Subcomponent

TOKENS = 1 << 14
"""Tokens whose importances are counted at once; float32 counts exactly to 2²⁴."""


@dataclass(frozen=True)
class ValueGivenKey(Printed):
    """On how many tokens each K and each V subcomponent is important, and both at once.

    Attributes:
        keys: subcomponents of W_K.
        values: subcomponents of W_V.
        threshold: θ.
        tokens: how many tokens were counted.
        both: on how many both are important.
        key_counts: on how many each key is.
        value_counts: on how many each value is.
    """

    keys: tuple[Subcomponent, ...]
    values: tuple[Subcomponent, ...]
    threshold: float
    tokens: int
    both: Int[Tensor, "key_c value_c"]
    key_counts: Int[Tensor, " key_c"]
    value_counts: Int[Tensor, " value_c"]

    @property
    def value_given_key(self) -> Float[Tensor, "key_c value_c"]:
        """P(V important | K important); NaN for keys that never are."""
        return self.both / self.key_counts[:, None]

    @property
    def key_given_value(self) -> Float[Tensor, "key_c value_c"]:
        """P(K important | V important); NaN for values that never are."""
        return self.both / self.value_counts

    def to_pandas(self, *, min_both: int = 1) -> pd.DataFrame:
        """One row per pair on at least ``min_both`` tokens: key, value, both, value_given_key, key_given_value, lift.

        ``lift`` is ``P(V | K) / P(V)``: how much more often V is important where K is than anywhere.
        """
        i, j = (self.both >= max(integer("min_both", min_both, minimum=0), 1)).nonzero(as_tuple=True)
        value_given_key = self.value_given_key[i, j]
        return pd.DataFrame(
            {
                "key": [str(self.keys[n]) for n in i.tolist()],
                "value": [str(self.values[n]) for n in j.tolist()],
                "both": self.both[i, j].tolist(),
                "value_given_key": value_given_key.tolist(),
                "key_given_value": self.key_given_value[i, j].tolist(),
                "lift": (value_given_key * self.tokens / self.value_counts[j]).tolist(),
            }
        )

    def top(self, k: int = 10, *, min_both: int = 20) -> pd.DataFrame:
        """The ``k`` pairs, on at least ``min_both`` tokens, that say most about each other: largest P(V|K) · P(K|V)."""
        k, table = integer("k", k, minimum=0), self.to_pandas(min_both=min_both)
        order = (table["value_given_key"] * table["key_given_value"]).nlargest(k).index
        return table.loc[order].reset_index(drop=True)


@torch.no_grad()
def value_given_key(
    decomposition: Decomposition,
    model: nn.Module,
    prompts: Any,
    layer: int,
    *,
    threshold: float = 0.1,
    attention_mask: Tensor | None = None,
) -> ValueGivenKey:
    """How often V and K subcomponents of a block are important at the same token.

    Args:
        decomposition: with W_K and W_V of the block.
        model: the target.
        prompts: a string, strings, or tokens ``[batch, pos]``.
        layer: the block's index.
        threshold: a subcomponent is important where its importance exceeds this.
        attention_mask: 0 at padding (None: where TransformerLens sees padding).

    Raises:
        KeyError: W_K or W_V of the block is not decomposed.
        ValueError: the threshold is not in [0, 1], the prompts do not fit, or the model has other weights.
    """
    threshold = check_threshold(threshold)
    k, v = (attention_site(decomposition, layer, weight) for weight in ("W_K", "W_V"))
    g = causal_importances(decomposition, model, prompts, attention_mask=attention_mask)
    real = torch.ones_like(g.tokens, dtype=torch.bool) if g.token_mask is None else g.token_mask
    keys, values = (g[site.name][real] > threshold for site in (k, v))
    return ValueGivenKey(
        keys=tuple(Subcomponent(k.name, i) for i in range(keys.shape[1])),
        values=tuple(Subcomponent(v.name, i) for i in range(values.shape[1])),
        threshold=threshold,
        tokens=int(real.sum()),
        both=_counts(keys, values),
        key_counts=keys.sum(0),
        value_counts=values.sum(0),
    )


def _counts(keys: Bool[Tensor, "token key_c"], values: Bool[Tensor, "token value_c"]) -> Int[Tensor, "key_c value_c"]:
    """On how many tokens both are true."""
    both = torch.zeros(keys.shape[1], values.shape[1], dtype=torch.long, device=keys.device)
    for k, v in zip(keys.split(TOKENS), values.split(TOKENS), strict=True):
        both += (k.float().T @ v.float()).long()
    return both


@torch.no_grad()
def head_alignment(decomposition: Decomposition, model: nn.Module, layer: int) -> HeadNorms:
    """How much of every V and O subcomponent of a block passes through each head's W_OV, ``[C, head]`` by site; raises KeyError
    where the block's W_V or W_O is not decomposed, ValueError where the model has other weights.
    """
    v, o = (attention_site(decomposition, layer, weight).name for weight in ("W_V", "W_O"))
    adapter = adapt(model)
    check_target(decomposition, adapter)
    W_V, W_O = ov_factors(adapter, layer)
    (V_v, U_v), (V_o, U_o) = (
        (decomposition.V[name].detach().to(W_V), decomposition.U[name].detach().to(W_V)) for name in (v, o)
    )
    # One head at a time: W_OV itself, d_model × d_model per head, is never formed.
    reads = torch.stack([(V_v.T @ V_h @ O_h).norm(dim=-1) for V_h, O_h in zip(W_V, W_O, strict=True)], dim=-1)
    writes = torch.stack([(U_o @ O_h.T @ V_h.T).norm(dim=-1) for V_h, O_h in zip(W_V, W_O, strict=True)], dim=-1)
    return HeadNorms(int(layer), {v: reads * U_v.norm(dim=1)[:, None], o: writes * V_o.norm(dim=0)[:, None]})
