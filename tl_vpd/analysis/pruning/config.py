"""How a circuit is pruned."""

from __future__ import annotations

from dataclasses import dataclass

from tl_vpd.analysis.pruning.attack import REACHES


@dataclass(frozen=True)
class PruneConfig:
    """How a circuit is pruned.

    Attributes:
        variant: ``adversarial`` masks and stochastic ones, or importances as masks alone (``importances_only``).
        steps, lr: of AdamW (weight decay 0), cosine to 0 after a warm-up over ``warm_up`` of the steps.
        p: exponent of the minimality loss.
        adversary_steps, adversary_step_size: of the attack in every step.
        reach: of the attack (``attack`` has the table); what it does not reach is drawn.
        seed: of sources.
    """

    variant: str = "adversarial"
    steps: int = 2000
    lr: float = 0.02
    warm_up: float = 0.02
    p: float = 0.3
    adversary_steps: int = 4
    adversary_step_size: float = 1.0
    reach: str = "alive_and_deltas"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.variant not in ("adversarial", "importances_only"):
            raise ValueError(f"variant={self.variant!r}: adversarial and importances_only are the two.")
        if self.reach not in REACHES:
            raise ValueError(f"reach={self.reach!r}: {', '.join(REACHES)} are known.")
        if self.steps < 1 or self.adversary_steps < 0:
            raise ValueError(
                f"steps={self.steps}, adversary_steps={self.adversary_steps}: at least one step is needed."
            )
