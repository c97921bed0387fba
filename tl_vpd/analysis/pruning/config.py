"""How a circuit is pruned."""

from __future__ import annotations

from dataclasses import dataclass

from tl_vpd.analysis.pruning.attack import REACHES


@dataclass(frozen=True)
class PruneConfig:
    """How a circuit is pruned.

    Attributes:
        variant: ``adversarial`` trains under stochastic and adversarial masks, ``importances_only`` with importances as masks.
        steps: of AdamW (weight decay 0).
        lr: its learning rate, cosine to 0 after a warm-up.
        warm_up: the fraction of the steps that the warm-up takes.
        p: exponent of the minimality loss.
        adversary_steps: of the attack in every step.
        adversary_step_size: of the attack in every step.
        reach: what the attack chooses sources for (``pruning.attack`` has the table); all other sources are random.
        seed: of sources.
        recorded: whether passes are recorded once and then run without Python, several times faster (None: from 100 steps on).
        progress: whether a bar is shown.

    Raises:
        ValueError: a value is out of range.
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
    recorded: bool | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        if self.variant not in ("adversarial", "importances_only"):
            raise ValueError(f"variant={self.variant!r}: choose 'adversarial' or 'importances_only'.")
        if self.reach not in REACHES:
            raise ValueError(f"reach={self.reach!r}: choose one of {', '.join(REACHES)}.")
        if self.steps < 1 or self.adversary_steps < 0:
            raise ValueError(
                f"steps={self.steps}, adversary_steps={self.adversary_steps}: give at least 1 step and 0 adversary steps."
            )
