"""Faithfulness (Δ-L2): the subcomponents must sum to the weights.

L_Δ = Σ_sites ‖W − V U‖² / number of decomposed weights
L_Δ = mean over sites of ‖W − V U‖² / ‖W‖²                   relative: comparable between models
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from tl_vpd.components import Components


def faithfulness(
    components: Components, weights: Mapping[str, Float[Tensor, "_ _"]], *, relative: bool = False
) -> Float[Tensor, ""]:
    """Squared error of ``V @ U`` against the target's weights, divided by how many weights there are.

    ``relative``: each site's by its own squared norm instead, averaged over sites.
    """
    squared = {name: components.delta(name, W).square().sum() for name, W in weights.items()}
    if relative:
        return torch.stack([squared[name] / W.square().sum() for name, W in weights.items()]).mean()
    return torch.stack(list(squared.values())).sum() / sum(W.numel() for W in weights.values())
