"""Adversaries against a pruned circuit: sources that make the behaviour least likely.

    r ← clamp(r + step · sign(∇_r loss), 0, 1)          (``masking.fresh_pgd``)

One source per subcomponent, Δ and position. Sources outside the adversary's reach keep their random values:

====================  =====================================================================
reach                 what it chooses sources for
====================  =====================================================================
``alive``             subcomponents at the positions where Γ gives them an importance above 0
``alive_and_deltas``  these and Δs
``everything``        every subcomponent at every position, and Δs
====================  =====================================================================
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_vpd.analysis.pruning.gradients import Gradient
from tl_vpd.masking import fresh_pgd

REACHES = ("alive", "alive_and_deltas", "everything")


def uniform_sources(
    g: Float[Tensor, "rows pos C_total"], sites: int, generator: torch.Generator
) -> Float[Tensor, "rows pos C_and_deltas"]:
    """Uniform sources of every subcomponent and of ``sites`` Δs, per row and position."""
    shapes = (g.shape, (*g.shape[:-1], sites))
    r, delta = (torch.rand(shape, generator=generator, device=g.device, dtype=g.dtype) for shape in shapes)
    return torch.cat([r, delta], dim=-1)


def within_reach(reach: str, alive: Bool[Tensor, "pos C_total"], sites: int) -> Bool[Tensor, "pos C_and_deltas"]:
    """Which sources an adversary of this reach chooses."""
    subcomponents = torch.ones_like(alive) if reach == "everything" else alive
    deltas = torch.full((len(alive), sites), reach != "alive", dtype=torch.bool, device=alive.device)
    return torch.cat([subcomponents, deltas], dim=-1)


def attack(
    gradient: Gradient,
    g: Float[Tensor, "rows pos C_total"],
    start: Float[Tensor, "rows pos C_and_deltas"],
    reachable: Bool[Tensor, "pos C_and_deltas"],
    *,
    steps: int,
    step_size: float,
) -> Float[Tensor, "rows pos C_and_deltas"]:
    """Sources after sign-gradient ascent from ``start`` along the ``gradient`` of every row's loss."""

    def loss(sources: Tensor) -> Tensor:
        # The loss itself is not needed, only its gradient: the pass after the last step is left out.
        if sources.requires_grad:
            sources.grad = gradient("sources", g, sources.detach()) * reachable
        return sources.new_zeros(())

    return fresh_pgd(loss, start, steps=steps, step_size=step_size).sources
