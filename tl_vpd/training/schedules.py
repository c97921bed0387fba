"""What changes over a run: learning rates, the minimality exponent, the adversary's learning rate.

lr(t) = lr · (f + (1 − f) · ½ (1 + cos π t / (T − 1)))       t = 0 … T − 1
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tl_vpd.training.config import VPDConfig


def cosine(step: int, steps: int, final: float) -> float:
    """Factor from 1 at step 0 to ``final`` at the last step."""
    progress = min(step / max(steps - 1, 1), 1.0)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def linear(step: int, steps: int, start: float, end: float) -> float:
    """From ``start`` at step 0 to ``end`` at step ``steps``."""
    return start + (end - start) * min(step / max(steps, 1), 1.0)


def warm_up(step: int, steps: int, fraction: float) -> float:
    """Factor that rises linearly from 0 over the first ``fraction`` of the run, then stays 1."""
    return min(step / max(fraction * steps, 1e-12), 1.0) if fraction else 1.0


@dataclass(frozen=True)
class Schedule:
    """Everything that changes over a run, at one step.

    ``p``, ``smooth``: exponent or γ of the minimality losses. ``minimality``: factor of their coefficients. ``rate``: factor of
    both learning rates. ``adversary_lr``: the adversary's learning rate.
    """

    p: float
    smooth: float
    minimality: float
    rate: float
    adversary_lr: float

    @classmethod
    def at(cls, step: int, config: VPDConfig) -> Schedule:
        """The schedule of a config at a step."""
        steps, minimality = config.steps, config.minimality
        return cls(
            p=linear(step, steps, minimality.p_start, minimality.p_end),
            smooth=linear(step, round(minimality.smooth_share * steps), minimality.smooth_start, minimality.smooth_end),
            minimality=warm_up(step, steps, minimality.warm_up),
            rate=cosine(step, steps, config.optimizer.lr_final),
            adversary_lr=config.adversary.lr * warm_up(step, steps, config.adversary.warm_up),
        )
