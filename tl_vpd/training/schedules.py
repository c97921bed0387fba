"""What changes over a run: learning rates, coefficients, the minimality exponent, the adversary's learning rate.

lr(t) = lr · (f + (1 − f) · ½ (1 + cos π t / d (T − 1)))       t = 0 … d (T − 1), then f · lr

The rest is piecewise linear (``tl_vpd.training.knots``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tl_vpd.training.config import VPDConfig
from tl_vpd.training.config_sections import Coefficients
from tl_vpd.training.knots import at


def cosine(step: int, steps: int, final: float, decay: float = 1.0) -> float:
    """Factor from 1 at step 0 to ``final`` after the fraction ``decay`` of the run, by default at the last step."""
    progress = min(step / max(decay * (steps - 1), 1), 1.0)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def warm_up(step: int | float, steps: int, fraction: float) -> float:
    """Factor that rises linearly from 0 over the first ``fraction`` of the run, then stays 1."""
    return min(step / max(fraction * steps, 1e-12), 1.0) if fraction else 1.0


@dataclass(frozen=True)
class Schedule:
    """Everything that changes over a run, at one step.

    ``p``, ``smooth``: exponent or γ of the minimality losses. ``locality``: width of the locality loss. ``rate``: factor of both
    learning rates. ``adversary_lr``: the adversary's learning rate. ``coefficients``: of the losses; the adversarial one is 0
    before the adversary's start.
    """

    p: float
    smooth: float
    locality: float
    rate: float
    adversary_lr: float
    coefficients: Coefficients

    @classmethod
    def at(cls, step: int, config: VPDConfig) -> Schedule:
        """The schedule of a config at a step."""
        steps, optimizer, adversary = config.steps, config.optimizer, config.adversary
        attacked_for = step - adversary.start * steps
        coefficients = config.coefficients.at(step, steps)
        if attacked_for < 0:
            coefficients = coefficients.model_copy(update={"adversarial": 0.0})
        return cls(
            p=at(config.minimality.p, step, steps),
            smooth=at(config.minimality.smooth, step, steps),
            locality=at(config.locality, step, steps),
            rate=cosine(step, steps, optimizer.lr_final, optimizer.lr_decay) * at(optimizer.lr_schedule, step, steps),
            adversary_lr=adversary.lr * warm_up(max(attacked_for, 0.0), steps, adversary.warm_up),
            coefficients=coefficients,
        )
