"""Subset routing: which sites take the masked path at a token.

*Uniform-k*: for each token draw ``k`` uniform in ``1..L`` and let ``k`` sites, chosen at random, be masked; the others run at
``x @ W``. It asks every subset size of sites to be replaceable and not only all of them at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor


def uniform_k_routing(
    names: Sequence[str], shape: tuple[int, int], *, generator: torch.Generator
) -> dict[str, Bool[Tensor, "batch pos"]]:
    """A uniform-k routing for tokens of ``shape`` (batch, pos), on the generator's device."""
    device = generator.device
    k = torch.randint(1, len(names) + 1, shape, generator=generator, device=device)
    ranks = torch.rand(len(names), *shape, generator=generator, device=device).argsort(dim=0).argsort(dim=0)
    return dict(zip(names, (ranks < k).unbind(0), strict=True))
