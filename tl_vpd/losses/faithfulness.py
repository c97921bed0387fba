"""Faithfulness: the subcomponents of each site must sum to its weight (VPD paper, section "Enforcing parameter faithfulness").

L_faithfulness = Σ_sites ‖W − V U‖² / number of decomposed weights      ``total``: the paper's L_Delta-L2
L_faithfulness = mean over sites of ‖W − V U‖² / ‖W‖²                   ``relative``: comparable between models
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
    """Squared error of ``V @ U`` against the target's weights.

    Args:
        components: V and U of every site.
        weights: W ``[d_in, d_out]`` by site.
        relative: divide each site's error by ``‖W‖²`` and average over sites; otherwise divide by the number of weights.

    Raises:
        ValueError: relative to a weight of zeros.
    """
    if relative:
        check_relative(weights)
    return torch.stack(list(faithfulness_terms(components, weights, relative=relative))).sum()


def check_relative(weights: Mapping[str, Float[Tensor, "_ _"]]) -> None:
    """Raises ValueError unless every weight has a norm that errors can be relative to."""
    for name, W in weights.items():
        if not bool(W.any()):
            raise ValueError(f"{name} is a matrix of zeros, to which no error is relative: leave it out of the sites.")


def faithfulness_terms(
    components: Components, weights: Mapping[str, Float[Tensor, "_ _"]], *, relative: bool = False
) -> Iterator[Float[Tensor, ""]]:
    """The terms of ``faithfulness``, one per site: with a backward after each, only one Δ is in memory at a time.

    Nothing waits for the device: ``check_relative`` is called once, before the first step.

    Args:
        components: V and U of every site.
        weights: W by site.
        relative: as in ``faithfulness``.
    """
    total = sum(W.numel() for W in weights.values())
    for name, W in weights.items():
        error = components.delta(name, W).square().sum()
        # A weight in half precision has a squared norm beyond it.
        yield error / (len(weights) * W.to(error.dtype).square().sum() if relative else total)
