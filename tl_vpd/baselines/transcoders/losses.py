"""The losses of transcoders, as functions of what a layer's encoder gave and what its MLP puts out.

    unexplained = Σ_t ‖y_t − ŷ_t‖² / Σ_t ‖y_t − ȳ‖²                   over the real tokens of a batch
    sparsity = (L0 / k − 1)²                                           JumpReLU's: L0 with straight-through gradients
    revival = Σ_t ‖e_t − ê_t‖² / Σ_t ‖y_t − ȳ‖²,   e = y − ŷ            ê from the k largest dead latents of a token

Sources: the L0 target of Rajamanoharan et al. 2024 (arXiv 2407.14435, section 4); the revival of dead latents of Gao et al. 2024
(arXiv 2406.04093, appendix A.2), here relative to the output's variance as the first is.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_vpd.baselines.transcoders.activations import step


def variance(y: Float[Tensor, "token d"]) -> Float[Tensor, ""]:
    """``Σ_t ‖y_t − ȳ‖²``, at least the smallest number that can be divided by."""
    return (y - y.mean(0)).square().sum().clamp_min(torch.finfo(y.dtype).tiny)


def unexplained(y: Float[Tensor, "token d"], predicted: Float[Tensor, "token d"]) -> Float[Tensor, ""]:
    """The share of the variance of ``y`` that is left."""
    return (y - predicted).square().sum() / variance(y)


def sparsity(
    z: Float[Tensor, "token n"], threshold: Float[Tensor, " n"], k: float, bandwidth: float
) -> Float[Tensor, ""]:
    """``(L0 / k − 1)²``, whose gradient reaches the thresholds.

    Args:
        z: pre-activations.
        threshold: θ.
        k: the L0 that is aimed at.
        bandwidth: of the straight-through gradient.
    """
    return (step(z, threshold, bandwidth).sum(-1).mean() / k - 1).square()


def revival(
    z: Float[Tensor, "token n"],
    dead: Bool[Tensor, " n"],
    W_dec: Float[Tensor, "n d"],
    error: Float[Tensor, "token d"],
    y: Float[Tensor, "token d"],
    k: int,
) -> Float[Tensor, ""]:
    """How much of what is left of ``y`` the dead latents leave unexplained.

    Args:
        z: pre-activations.
        dead: which latents are dead; at least one.
        W_dec: decoders to the layer's own MLP.
        error: ``y − ŷ``, a constant.
        y: the MLP's output.
        k: dead latents per token.
    """
    among = z[:, dead].relu()
    values, indices = among.topk(min(k, among.shape[1]), dim=-1)
    sparse = torch.zeros_like(among).scatter(-1, indices, values)
    return (error - sparse @ W_dec[dead]).square().sum() / variance(y)
