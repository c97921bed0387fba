"""Faithfulness (Δ-L2): the subcomponents must sum to the weights.

L_Δ = Σ_sites ‖W − V U‖² / number of decomposed weights
L_Δ = mean over sites of ‖W − V U‖² / ‖W‖²                   relative: comparable between models
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

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
    return torch.stack(list(faithfulness_terms(components, weights, relative=relative))).sum()


def faithfulness_terms(
    components: Components, weights: Mapping[str, Float[Tensor, "_ _"]], *, relative: bool = False
) -> Iterator[Float[Tensor, ""]]:
    """The terms of ``faithfulness`` site by site: with a backward after each, one site's Δ is held at once."""
    total = sum(W.numel() for W in weights.values())
    for name, W in weights.items():
        yield components.delta(name, W).square().sum() / (len(weights) * W.square().sum() if relative else total)
