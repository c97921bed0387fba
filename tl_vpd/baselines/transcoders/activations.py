"""The activations of transcoders: JumpReLU with straight-through gradients, and batch top-k.

    JumpReLU_θ(z) = z H(z − θ)            ∂/∂z = H(z − θ),    ∂/∂θ := −(θ/ε) K((z − θ)/ε)
    H(z − θ)                              ∂/∂z = 0,           ∂/∂θ := −(1/ε) K((z − θ)/ε)

with K(u) = 1 for |u| < ½, else 0, and the bandwidth ε (Rajamanoharan et al. 2024, arXiv 2407.14435, section 3). Batch top-k
(Bussmann et al. 2024, arXiv 2412.06410) leaves the k · n largest activations of n tokens together, so that a token may have more
or fewer than k. Without the batch, it is a JumpReLU whose threshold is the mean over training batches of the smallest
activation that was left.

>>> jump_relu(torch.tensor([-1.0, 0.5, 2.0]), torch.tensor([1.0, 1.0, 1.0]))
tensor([-0., 0., 2.])
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_vpd.baselines.apd_losses import batch_top_k

BANDWIDTH = 0.5
"""ε, in the units of pre-activations, which have a standard deviation of about 1 when training begins."""


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return z * (z > threshold)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,), (z, threshold) = gradients, ctx.saved_tensors
        at_threshold = -(threshold / ctx.bandwidth) * kernel(z, threshold, ctx.bandwidth)
        return grad * (z > threshold), (grad * at_threshold).reshape(-1, len(threshold)).sum(0), None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return (z > threshold).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        (grad,), (z, threshold) = gradients, ctx.saved_tensors
        towards = -grad / ctx.bandwidth * kernel(z, threshold, ctx.bandwidth)
        return None, towards.reshape(-1, len(threshold)).sum(0), None


def kernel(z: Float[Tensor, "*batch n"], threshold: Float[Tensor, " n"], bandwidth: float) -> Float[Tensor, "*batch n"]:
    """K((z − θ)/ε): 1 within half a bandwidth of the threshold."""
    return (((z - threshold) / bandwidth).abs() < 0.5).to(z.dtype)


def jump_relu(
    z: Float[Tensor, "*batch n"], threshold: Float[Tensor, " n"], bandwidth: float = BANDWIDTH
) -> Float[Tensor, "*batch n"]:
    """``z H(z − θ)``, for thresholds of at least 0."""
    return _JumpReLU.apply(z, threshold, bandwidth)  # type: ignore[no-any-return]


def step(
    z: Float[Tensor, "*batch n"], threshold: Float[Tensor, " n"], bandwidth: float = BANDWIDTH
) -> Float[Tensor, "*batch n"]:
    """``H(z − θ)``: 1 where a latent is active. Its gradient reaches the threshold alone."""
    return _Step.apply(z, threshold, bandwidth)  # type: ignore[no-any-return]


def top_k_of_batch(
    z: Float[Tensor, "*batch n"], k: float, token_mask: Bool[Tensor, "*batch"] | None = None
) -> Float[Tensor, "*batch n"]:
    """The positive ones among the k · (real tokens) largest pre-activations of a batch, 0 elsewhere.

    Args:
        z: pre-activations.
        k: latents per token, on average.
        token_mask: False at padding, which is left out (None: no padding).
    """
    acts = z.relu()
    if token_mask is None:
        return acts * batch_top_k(acts, k)
    selected = torch.zeros_like(acts, dtype=torch.bool)
    selected[token_mask] = batch_top_k(acts[token_mask], k)
    return acts * selected
