"""How a circuit is pruned."""

from __future__ import annotations

from dataclasses import dataclass

from tl_vpd.analysis.pruning.attack import REACHES
from tl_vpd.checks import check_fields, choice, number


@dataclass(frozen=True)
class PruneConfig:
    """How a circuit is pruned.

    Attributes:
        variant: ``adversarial`` trains under stochastic and adversarial masks, ``importances_only`` with importances as masks.
        steps: of AdamW (weight decay 0).
        lr: its learning rate, cosine to 0 after a warm-up.
        warm_up: the fraction of the steps that the warm-up takes.
        p: exponent of the minimality loss.
        adversary_steps: of the attack in every step (0: sources stay random, and no attack of pruning is reported).
        adversary_step_size: of the attack in every step.
        reach: what the attack chooses sources for (``pruning.attack`` has the table); all other sources are random.
        seed: of sources.
        recorded: whether passes are recorded once and then run without Python, several times faster (None: from 100 steps on).
        progress: whether a bar is shown.
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
        choice("variant", self.variant, ("adversarial", "importances_only"))
        choice("reach", self.reach, REACHES)
        check_fields(self, steps=1, warm_up=(0, 1), adversary_steps=0)
        for name in ("lr", "p", "adversary_step_size"):
            number(name, getattr(self, name), above=0)
