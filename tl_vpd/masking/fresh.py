"""The evaluation adversary: fresh projected gradient ascent (PGD) with shared sources.

New sources for a batch, one per subcomponent and Δ, shared over batch and positions: an adversary that must find one
setting that is bad everywhere looks for systematic faults and cannot fit noise (VPD paper, section on evaluation).

    r ← clamp(r + step · sign(∇_r loss), 0, 1)        from a random start; scored after the last step

Report the budget with the number; a rule of thumb is ``steps · step_size = 2``. Momentum (Dong et al. 2018, arXiv 1710.06081)
steps along a running sum of normalised gradients, and several starts guard against one that gets stuck:

    v ← μ v + ∇_r loss / mean|∇_r loss|,      r ← clamp(r + step · sign(v), 0, 1)

The mean is over the sources of each row, so that rows that do not share sources do not mix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_vpd.checks import integer, number, shown
from tl_vpd.masking.masks import Masks, masks_from_sources
from tl_vpd.printing import Printed
from tl_vpd.site import ConcatenatedAxis


@dataclass(frozen=True)
class AttackResult(Printed):
    """The result of an attack.

    Attributes:
        sources: after the last step.
        losses: before each step and after the last.
    """

    sources: Float[Tensor, "*ones C_and_deltas"]
    losses: list[float]

    @property
    def loss(self) -> float:
        """The loss after the last step: the figure to report."""
        return self.losses[-1]


@torch.inference_mode(False)
def fresh_pgd(
    loss: Callable[[Float[Tensor, "*ones C_and_deltas"]], Float[Tensor, ""]],
    start: Float[Tensor, "*ones C_and_deltas"],
    *,
    steps: int = 20,
    step_size: float | None = None,
    momentum: float = 0.0,
) -> AttackResult:
    """Sign-gradient ascent on ``loss(sources)`` from ``start``.

    Args:
        loss: differentiable in the sources. It may run its backward pass piecewise: then it returns a detached value and
            leaves the gradient in ``sources.grad``.
        start: sources in [0, 1].
        steps: number of updates; 0 scores the start.
        step_size: length of each (None: ``2 / steps``).
        momentum: μ in [0, 1), the factor of the running sum of gradients.

    Raises:
        TypeError: an option is not a number, the loss not a function, or the start not a tensor.
        ValueError: an option is out of its range, or the start is not in [0, 1].
    """
    _check_loss(loss)
    if not isinstance(start, Tensor) or not start.is_floating_point():
        raise TypeError(f"The start is {shown(start)}: give a tensor of floating-point numbers in [0, 1].")
    steps = integer("steps", steps, minimum=0)
    size = 2.0 / max(steps, 1) if step_size is None else number("step_size", step_size, above=0)
    momentum = number("momentum", momentum, minimum=0, maximum=1)
    if momentum == 1:
        raise ValueError("momentum=1: give a number from 0 (none) to below 1.")
    if not bool(((start >= 0) & (start <= 1)).all()):
        raise ValueError("The start has entries that are NaN or outside [0, 1]: sources are in [0, 1].")
    velocity: Tensor | None = None
    sources = start.detach().clone()
    losses: list[float] = []
    with torch.enable_grad():
        for _ in range(steps):
            leaf = sources.requires_grad_()
            value = loss(leaf)
            if not isinstance(value, Tensor):
                raise TypeError(f"The loss returned a {type(value).__name__}: return a tensor of one number.")
            if value.requires_grad:
                (gradient,) = torch.autograd.grad(value, leaf)
            else:
                assert leaf.grad is not None, "a piecewise loss must leave its gradient in sources.grad"
                gradient = leaf.grad
            losses.append(float(value.detach()))
            if momentum:
                mean = gradient.abs().mean(tuple(range(min(1, gradient.ndim - 1), gradient.ndim)), keepdim=True)
                unit = gradient / mean.clamp_min(torch.finfo(gradient.dtype).tiny)
                velocity = unit if velocity is None else momentum * velocity + unit
                gradient = velocity
            sources = (leaf.detach() + size * gradient.sign()).clamp_(0, 1)
    with torch.no_grad():
        losses.append(float(loss(sources)))
    return AttackResult(sources, losses)


def _check_loss(loss: object) -> None:
    """Raises TypeError unless a loss is a function."""
    if not callable(loss):
        raise TypeError(f"The loss is a {type(loss).__name__}: give a function that returns a tensor of one number.")


def shared_start(
    g: Float[Tensor, "*batch C_total"], site_axis: ConcatenatedAxis, generator: torch.Generator | None = None
) -> Float[Tensor, "*ones C_and_deltas"]:
    """Random sources, one per subcomponent and Δ, shared over batch and positions; ``generator`` None: torch's global one."""
    width = site_axis.total + len(site_axis.names)
    return torch.rand(*[1] * (g.ndim - 1), width, generator=generator, device=g.device).to(g.dtype)


@torch.inference_mode(False)
def attacked_masks(
    g: Float[Tensor, "*batch C_total"],
    site_axis: ConcatenatedAxis,
    loss: Callable[[Masks], Float[Tensor, ""]],
    *,
    steps: int = 20,
    step_size: float | None = None,
    generator: torch.Generator | None = None,
) -> Masks:
    """The worst masks that an attack on a ``loss`` of masks reaches from importances ``g`` (what is 1 cannot be ablated);
    sources are shared. The attack is ``fresh_pgd`` from a random start.
    """
    _check_loss(loss)
    g = g.clone() if g.is_inference() else g  # autograd may save it then
    # In half precision the gradient of a mean over many tokens is rounded to 0; a power of two changes nothing else.
    scale = 2.0 ** (g[..., 0].numel().bit_length() - 1)
    result = fresh_pgd(
        lambda sources: scale * loss(masks_from_sources(g, sources, site_axis)),
        shared_start(g, site_axis, generator),
        steps=steps,
        step_size=step_size,
    )
    return masks_from_sources(g, result.sources, site_axis)


def restarted_pgd(
    loss: Callable[[Float[Tensor, "*ones C_and_deltas"]], Float[Tensor, ""]],
    starts: Iterable[Float[Tensor, "*ones C_and_deltas"]],
    *,
    steps: int = 20,
    step_size: float | None = None,
    momentum: float = 0.0,
) -> list[AttackResult]:
    """``fresh_pgd`` from every start, the worst (of the largest loss) first; other arguments, and errors, as in ``fresh_pgd``."""
    results = [fresh_pgd(loss, start, steps=steps, step_size=step_size, momentum=momentum) for start in starts]
    if not results:
        raise ValueError("There is no start: give one or more sources in [0, 1].")
    return sorted(results, key=lambda result: result.loss, reverse=True)
