"""Faithfulness (Δ-L2): the subcomponents must sum to the weights.

L_Δ = Σ_sites ‖W − V U‖² / number of decomposed weights
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from tl_vpd.components import Components


def faithfulness(components: Components, weights: Mapping[str, Float[Tensor, "_ _"]]) -> Float[Tensor, ""]:
    """Squared error of ``V @ U`` against the target's weights, divided by how many weights there are."""
    squared = [components.delta(name, W).square().sum() for name, W in weights.items()]
    return torch.stack(squared).sum() / sum(W.numel() for W in weights.values())
