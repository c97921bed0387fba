"""Subset routing: which sites are masked at a token.

*Uniform-k* (VPD paper, section on losses): for each token draw ``k`` uniform in ``1..L`` and mask ``k`` random sites; the others
run at ``x @ W``. So every subset of sites must be replaceable, and not only all of them at once.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor


def uniform_k(n: int, shape: tuple[int, ...], *, generator: torch.Generator) -> Bool[Tensor, "n *batch"]:
    """A uniform-k routing of n sites for tokens of ``shape`` (batch, pos), on the generator's device."""
    device = generator.device
    k = torch.randint(1, n + 1, shape, generator=generator, device=device)
    ranks = torch.rand(n, *shape, generator=generator, device=device).argsort(dim=0).argsort(dim=0)
    return ranks < k


def uniform_k_share(n: int) -> float:
    """The share of tokens at which uniform-k is expected to mask one of n sites."""
    return (n + 1) / (2 * n)
