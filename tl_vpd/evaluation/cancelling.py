"""Subcomponents that cancel each other: a weight made of ``X`` and ``−X`` says nothing about the model.

Two subcomponents of a site point against each other where the cosine of their rank-one matrices is near −1:

    cos(V_c ⊗ U_c, V_c' ⊗ U_c') = cos(V_c, V_c') · cos(U_c, U_c')

Their sum is smaller than each: both can be left out together, but not one without the other. It needs no data, and says
which pairs to look at where partial ablation does harm that full ablation does not.

    >>> cancelling_pairs(vpd)                                  # doctest: +SKIP
"""

from __future__ import annotations

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tl_vpd.checks import integer, number
from tl_vpd.components import Components
from tl_vpd.decomposition import Decomposition
from tl_vpd.forward.target_check import check_decomposition

COLUMNS = ["one", "other", "cosine", "norm", "norm_other", "norm_sum"]


def rank_one_cosines(V: Float[Tensor, "d_in C"], U: Float[Tensor, "C d_out"]) -> Float[Tensor, "C C"]:
    """Cosines of all pairs of rank-one matrices of a site."""
    v, u = F.normalize(V, dim=0), F.normalize(U, dim=1)
    return (v.T @ v) * (u @ u.T)


@torch.no_grad()
def cancelling_pairs(
    decomposition: Decomposition | Components, *, below: float = -0.9, smallest: float = 0.05, k: int = 100
) -> pd.DataFrame:
    """Pairs whose cosine is below a bound, the most opposed first: both names, cosine, norms, and the norm of their sum.

    Args:
        decomposition: V and U.
        below: the bound.
        smallest: leave out subcomponents with less than this share of their site's largest norm, ``‖V_c‖ ‖U_c‖``.
        k: at most so many pairs per site.

    Raises:
        TypeError: an argument is of another type.
        ValueError: a number is out of its range.
    """
    check_decomposition(decomposition)
    below, smallest = number("below", below, minimum=-1, maximum=1), number("smallest", smallest, minimum=0)
    k = integer("k", k, minimum=0)
    rows = []
    for name in decomposition.sites:
        V, U = decomposition.V[name].detach().float(), decomposition.U[name].detach().float()
        norms = V.norm(dim=0) * U.norm(dim=1)
        cosines = rank_one_cosines(V, U)
        large = norms >= smallest * norms.max()
        pairs = (large[:, None] & large[None]).triu(1)
        candidates = cosines.masked_fill(~pairs, torch.inf).flatten()
        lowest = candidates.topk(min(k, len(candidates)), largest=False)
        for index in lowest.indices[lowest.values < below].tolist():
            c, other = divmod(index, len(norms))
            a, b, cosine = float(norms[c]), float(norms[other]), float(cosines[c, other])
            total = max(a * a + b * b + 2 * a * b * cosine, 0.0) ** 0.5
            rows.append((f"{name}:{c}", f"{name}:{other}", cosine, a, b, total))
    return pd.DataFrame(rows, columns=COLUMNS).sort_values("cosine", ignore_index=True)
