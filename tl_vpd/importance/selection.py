"""A decomposition of fewer subcomponents: columns of V, rows of U, and what of Γ is theirs.

    V'[:, j] = V[:, i_j]        U'[j] = U[i_j]        z'_j(x) = z_{i_j}(x)

Γ reads the sites' inputs (or each subcomponent's inner activation), so the importances of the selected ones do not change. Δ,
which is taken from the model's weights, takes up the others: ``Δ' = W − V' U'``.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from tl_vpd.importance.decomposed import DecomposedWeights

D = TypeVar("D", bound=DecomposedWeights)


@torch.no_grad()
def selected(weights: D, indices: Mapping[str, Int[Tensor, " _"]]) -> D:
    """The decomposition with these subcomponents alone, in this order.

    Args:
        weights: V, U and Γ, of which everything is copied.
        indices: of every site, at least one.

    Raises:
        ValueError: a site has none.
    """
    counts = {name: len(indices[name]) for name in weights.sites}
    with torch.device("meta"):
        fewer = type(weights)(
            list(weights.sites.values()),
            counts,
            weights.gamma_config,
            fingerprints=weights.fingerprints,
            record=deepcopy(weights.record),
        )
    fewer.to(next(weights.parameters()).dtype).to_empty(device=weights.device)
    rows, old = weights.gamma.rows_of_subcomponents(), weights.file_tensors()
    places = {name: index.to(weights.device) for name, index in indices.items()}
    for key, tensor in fewer.file_tensors().items():
        matrix, _, name = key.partition("/")
        if matrix == "V":
            tensor.copy_(old[key][:, places[name]])
        elif matrix == "U":
            tensor.copy_(old[key][places[name]])
        elif name in rows:
            starts = torch.tensor([weights.counts[site] for site in rows[name]]).cumsum(0).tolist()
            index = [start + places[site] for start, site in zip([0, *starts], rows[name], strict=False)]
            tensor.copy_(old[key][torch.cat(index)])
        else:
            tensor.copy_(old[key])
    return fewer
