"""APD's equations (arXiv 2501.14926, section 2): attributions, batch top-k, and its losses."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_vpd.baselines.components import FullComponents


def attributions(
    components: FullComponents,
    inputs: Mapping[str, Float[Tensor, "batch pos _"]],
    gradients: Mapping[str, Float[Tensor, "d batch pos _"]],
) -> Float[Tensor, "batch pos C"]:
    """``A_c(x)``, from every site's input and the gradients of each output dimension with respect to every site's output."""
    # ⟨∂f_o/∂W, P⟩ = Σ_ij x_i δ_oj P_ij: the piece's output, along the gradient.
    terms = []
    for site in components.names:
        A, B = components.factors(site)
        outputs = torch.einsum("b p i, c i k, c k j -> b p c j", inputs[site], A, B)
        terms.append(torch.einsum("b p c j, d b p j -> d b p c", outputs, gradients[site]))
    return torch.stack(terms).sum(0).square().mean(0).sqrt()


def batch_top_k(values: Float[Tensor, "*batch C"], k: float) -> Bool[Tensor, "*batch C"]:
    """True at the ``k`` largest per input, on average over the batch."""
    count = max(1, min(round(k * values[..., 0].numel()), values.numel()))
    chosen = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
    chosen[values.flatten().topk(count).indices] = True
    return chosen.view(values.shape)


def schatten(components: FullComponents, p: float) -> Float[Tensor, " C"]:
    """``Σ_l Σ_k (‖A_:k‖² ‖B_k:‖²)^{p/2}`` of every component."""
    total = []
    for site in components.names:
        A, B = components.factors(site)
        # ε keeps the slope of the power finite at 0.
        total.append((A.square().sum(1) * B.square().sum(2) + 1e-16).pow(p / 2).sum(-1))
    return torch.stack(total).sum(0)


def simplicity(components: FullComponents, s: Float[Tensor, "batch pos C"], p: float) -> Float[Tensor, ""]:
    """Schatten norms of an input's selected components, averaged over inputs and divided by the number of weights."""
    weights = sum(math.prod(components.shapes[site]) for site in components.names)
    return (s.mean((0, 1)) * schatten(components, p)).sum() / weights


def unfaithfulness(components: FullComponents, weights: Mapping[str, Float[Tensor, "_ _"]]) -> Float[Tensor, ""]:
    """Squared error of the components' sum, divided by the number of weights."""
    errors = [(W - components.matrices(site).sum(0)).square().sum() for site, W in weights.items()]
    return torch.stack(errors).sum() / sum(W.numel() for W in weights.values())
