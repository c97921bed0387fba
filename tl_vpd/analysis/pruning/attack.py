"""Adversaries against a pruned circuit: sources that make the behaviour least likely.

    r ← clamp(r + step · sign(∇_r loss), 0, 1)

One source a subcomponent, Δ and position. Sources that are out of the adversary's reach stay as they were drawn:

====================  ===================================================================
reach                 what it chooses for
====================  ===================================================================
``alive``             subcomponents that are important somewhere by Γ's account, there
``alive_and_deltas``  these and Δs
``everything``        every subcomponent at every position, and Δs
====================  ===================================================================
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_vpd.analysis.pruning.recorded import Gradients

REACHES = ("alive", "alive_and_deltas", "everything")
Sources = tuple[Float[Tensor, "rows pos C_total"], Float[Tensor, "rows pos sites"]]
"""Sources of subcomponents and of Δs."""


def draw(like: Float[Tensor, "rows pos C_total"], sites: int, generator: torch.Generator) -> Sources:
    """Uniform sources."""
    shapes = (like.shape, (*like.shape[:-1], sites))
    r, delta = (torch.rand(s, generator=generator, device=like.device, dtype=like.dtype) for s in shapes)
    return r, delta


def attack(
    gradients: Gradients,
    g: Float[Tensor, "rows pos C_total"],
    start: Sources,
    *,
    steps: int,
    step_size: float,
    reach: str,
    alive: Bool[Tensor, "pos C_total"],
) -> Sources:
    """Sign-gradient ascent from ``start`` on every row's loss, whose ``gradients`` are given."""
    r, delta = (own.clone() for own in start)
    free = 1 - g if reach == "everything" else (1 - g) * alive
    for _ in range(steps):
        of_mask, of_delta = gradients(torch.lerp(r, torch.ones_like(r), g), delta)
        r = r.add_(of_mask.mul(free).sign_(), alpha=step_size).clamp_(0, 1)
        if reach != "alive":
            delta = delta.add_(of_delta.sign(), alpha=step_size).clamp_(0, 1)
    return r, delta
