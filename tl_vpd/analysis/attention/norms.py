"""How strongly each subcomponent of an attention layer acts in each head.

    ‖V_c‖ ‖U^h_c‖   (Q, K, V: the head is in the write direction)          ‖V^h_c‖ ‖U_c‖   (O: in the read direction)

>>> norms = head_norms(vpd, 1)                                                                            # doctest: +SKIP
>>> norms["blocks.1.attn.W_Q"].shape                                                                      # doctest: +SKIP
torch.Size([96, 4])
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_vpd.checks import instance, integer
from tl_vpd.decomposition import Decomposition
from tl_vpd.printing import Printed
from tl_vpd.site import BySite, Site, Subcomponent


def spread_over_heads(norms: Float[Tensor, "*batch head"]) -> Float[Tensor, "*batch"]:
    """Over how many heads norms are spread: ``(Σ_h n²)² / Σ_h n⁴``, between 1 (one head) and the number of heads (all alike)."""
    squares = norms.square()
    return squares.sum(-1).square() / squares.square().sum(-1).clamp(min=torch.finfo(norms.dtype).tiny)


@dataclass(frozen=True)
class HeadNorms(BySite, Printed):
    """Norms by site, ``[C, head]``; W_K and W_V have as many heads as the model has key/value heads."""

    layer: int
    by_site: dict[str, Float[Tensor, "C head"]]

    def to_pandas(self) -> pd.DataFrame:
        """One row per subcomponent: subcomponent, site, norm (over all heads), heads (how many it is spread over), head_0, …"""
        tables = []
        for site, norms in self.by_site.items():
            names = [str(Subcomponent(site, i)) for i in range(len(norms))]
            table = pd.DataFrame({"subcomponent": names, "site": site, "norm": norms.norm(dim=-1).tolist()})
            table["heads"] = spread_over_heads(norms).tolist()
            for head in range(norms.shape[1]):
                table[f"head_{head}"] = norms[:, head].tolist()
            tables.append(table)
        return pd.concat(tables, ignore_index=True)

    def top(self, k: int = 10, *, head: int | None = None) -> pd.DataFrame:
        """The ``k`` subcomponents of the largest norm, over all heads or in one."""
        heads = max(norms.shape[1] for norms in self.by_site.values())
        column = "norm" if head is None else f"head_{integer('head', head, minimum=0, maximum=heads - 1)}"
        return self.to_pandas().nlargest(integer("k", k, minimum=0), column).reset_index(drop=True)


def norms_by_head(V: Float[Tensor, "d_in C"], U: Float[Tensor, "C d_out"], site: Site) -> Float[Tensor, "C head"]:
    """``‖V_c‖ ‖U_c‖`` with the side that has heads divided into them."""
    if site.n_heads is None:
        raise ValueError(f"{site.name} has no heads.")
    if site.short == "o":
        return V.unflatten(0, (site.n_heads, -1)).norm(dim=1).T * U.norm(dim=1)[:, None]
    return U.unflatten(1, (site.n_heads, -1)).norm(dim=-1) * V.norm(dim=0)[:, None]


@torch.no_grad()
def head_norms(decomposition: Decomposition, layer: int) -> HeadNorms:
    """Norms by head of every subcomponent of a block's Q, K, V and O that is decomposed; raises KeyError where none is."""
    instance("decomposition", decomposition, Decomposition)
    layer = integer("layer", layer, minimum=0)
    sites = [
        s for s in decomposition.sites.values() if s.layer == layer and s.short in ("q", "k", "v", "o") and s.n_heads
    ]
    if not sites:
        raise KeyError(
            f"Nothing of block {layer}'s attention is decomposed: the sites are {', '.join(decomposition.sites)}."
        )
    return HeadNorms(layer, {s.name: norms_by_head(decomposition.V[s.name], decomposition.U[s.name], s) for s in sites})
