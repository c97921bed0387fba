"""Which V subcomponents go with which K ones, and with which heads.

At the source token a key says *whether* it is read and a value *what* is read. Where K's c' is important, how often is V's c?

    P(V_c | K_c') = #(g_V,c > θ and g_K,c' > θ) / #(g_K,c' > θ)          and back

A subcomponent's alignment with a head is how much of it passes through the head's W_OV:

    ‖v_c W_OV^h‖ ‖u_c‖   (V: what it reads)          ‖W_OV^h u_cᵀ‖ ‖v_c‖   (O: what it writes)

>>> found = value_given_key(vpd, model, tokens, 1)                                                        # doctest: +SKIP
>>> found.top(5)                                                                                          # doctest: +SKIP
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_vpd.adapters import adapt
from tl_vpd.analysis.attention.layer import attention_site
from tl_vpd.analysis.attention.norms import HeadNorms
from tl_vpd.analysis.attention.ov import ov_matrices
from tl_vpd.hooks.importances import causal_importances
from tl_vpd.site import Subcomponent

if TYPE_CHECKING:
    from tl_vpd.decomposition import Decomposition


@dataclass(frozen=True)
class ValueGivenKey:
    """On how many tokens each K and each V subcomponent is important, and both at once; of ``tokens`` in all."""

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
        """One row a pair met on ``min_both`` tokens: key, value, both, value_given_key, key_given_value, lift.

        ``lift`` is ``P(V | K) / P(V)``: how much more often V is important where K is than anywhere.
        """
        i, j = (self.both >= max(min_both, 1)).nonzero(as_tuple=True)
        given = self.value_given_key[i, j]
        return pd.DataFrame(
            {
                "key": [str(self.keys[n]) for n in i.tolist()],
                "value": [str(self.values[n]) for n in j.tolist()],
                "both": self.both[i, j].tolist(),
                "value_given_key": given.tolist(),
                "key_given_value": self.key_given_value[i, j].tolist(),
                "lift": (given * self.tokens / self.value_counts[j]).tolist(),
            }
        )

    def top(self, k: int = 10, *, min_both: int = 20) -> pd.DataFrame:
        """The ``k`` pairs, met at least ``min_both`` times, that say most about each other: largest P(V|K) · P(K|V)."""
        table = self.to_pandas(min_both=min_both)
        order = (table["value_given_key"] * table["key_given_value"]).nlargest(k).index
        return table.loc[order].reset_index(drop=True)


def together(
    keys: Bool[Tensor, "token key_c"], values: Bool[Tensor, "token value_c"]
) -> tuple[Int[Tensor, "key_c value_c"], Int[Tensor, " key_c"], Int[Tensor, " value_c"]]:
    """On how many tokens both, the one, and the other are true."""
    # float64 counts exactly to 2^53, float32 only to 2^24 tokens.
    both = keys.double().T @ values.double()
    return both.round().long(), keys.sum(0), values.sum(0)


@torch.no_grad()
def value_given_key(
    decomposition: Decomposition,
    model: nn.Module,
    prompts: Any,
    layer: int,
    *,
    above: float = 0.1,
    attention_mask: Tensor | None = None,
) -> ValueGivenKey:
    """How often V and K subcomponents of a block are important at the same token.

    Raises:
        KeyError: W_K or W_V of the block is not decomposed. ValueError: the prompts are empty, too long, or not this model's.
    """
    k, v = (attention_site(decomposition, layer, weight) for weight in ("W_K", "W_V"))
    g = causal_importances(decomposition, model, prompts, attention_mask=attention_mask)
    real = (
        torch.ones(g.tokens.shape, dtype=torch.bool, device=g.tokens.device) if g.token_mask is None else g.token_mask
    )
    both, keys, values = together(g[k.name][real] > above, g[v.name][real] > above)
    return ValueGivenKey(
        tuple(Subcomponent(k.name, i) for i in range(len(keys))),
        tuple(Subcomponent(v.name, i) for i in range(len(values))),
        above,
        int(real.sum()),
        both,
        keys,
        values,
    )


@torch.no_grad()
def head_alignment(decomposition: Decomposition, model: nn.Module, layer: int) -> HeadNorms:
    """How much of every V and O subcomponent of a block passes through each head's W_OV, ``[C, head]`` by site.

    Raises:
        KeyError: the block's W_V or W_O is not decomposed.
    """
    v, o = (attention_site(decomposition, layer, weight).name for weight in ("W_V", "W_O"))
    W = ov_matrices(adapt(model), layer)
    parts = {name: (decomposition.V[name].detach().to(W), decomposition.U[name].detach().to(W)) for name in (v, o)}
    (V_v, U_v), (V_o, U_o) = parts[v], parts[o]
    reads = torch.einsum("ic,hio->hco", V_v, W).norm(dim=-1).T * U_v.norm(dim=1)[:, None]
    writes = torch.einsum("co,hio->hci", U_o, W).norm(dim=-1).T * V_o.norm(dim=0)[:, None]
    return HeadNorms(layer, {v: reads, o: writes})
