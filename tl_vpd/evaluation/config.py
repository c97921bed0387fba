"""What an evaluation measures, and how much it may cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tl_vpd.evaluation.sample import KEEP_BYTES
from tl_vpd.site import nearest

BUDGETS = (20, 40, 80, 160, 320)
MEASURES = (
    "adversaries",
    "union_test",
    "mask_transfer",
    "hidden",
    "sparsity_sweep",
    "cancelling",
    "off_distribution",
    "future_leakage",
)
"""What is measured in addition to the mode table, the counts and the standard adversary."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Settings of ``evaluate``.

    Args:
        measures: which of ``MEASURES``. Each costs passes, most of all ``adversaries``: four more kinds at each of
            ``adversary_budgets``.
        budgets: steps of the standard adversary, each with ``step_size = 2 / steps``. It attacks all rows together with sources
            that they share, Δ's included (empty: no attack on the decomposition; controls have ``control_budgets``).
        starts: random starts of the standard adversary at each budget, or by budget (one at the others). ``pgd_kl`` gives the
            worst, ``pgd_kl_starts`` all.
        adversary_budgets: steps of the other kinds of adversary.
        attack_rows: only the first rows are attacked, which costs less (None: all).
        controls: whether the random, singular and shuffled controls are measured too.
        control_budgets: steps of the standard adversary on the controls.
        batch_size: how many rows run together; figures do not depend on it.
        seed: of all random numbers.
        curve: the target's validation curve of (step, CE), for compute recovered.
        keep_bytes: how much memory the targets and importances of one sample may take between passes. What does not fit is
            computed again in each pass, with the same figures.

    Raises:
        KeyError: there is no such measure.
        TypeError: the measures are a string.
        ValueError: a number is out of its range, or ``starts`` names a budget that is not attacked.
    """

    measures: Sequence[str] = MEASURES
    budgets: Sequence[int] = BUDGETS
    starts: int | Mapping[int, int] = 1
    adversary_budgets: Sequence[int] = (20, 80)
    attack_rows: int | None = None
    controls: bool = True
    control_budgets: Sequence[int] = (20,)
    batch_size: int = 16
    seed: int = 0
    curve: Sequence[Sequence[int | float]] | None = None
    keep_bytes: int = KEEP_BYTES

    def __post_init__(self) -> None:
        if isinstance(self.measures, str):
            raise TypeError(
                f"measures={self.measures!r} is a string: give names in a list, such as [{self.measures!r}]."
            )
        for name in self.measures:
            if name not in MEASURES:
                raise KeyError(f"{name!r} is not a measure{nearest(name, MEASURES)}. Measures: {', '.join(MEASURES)}.")
        if self.attack_rows is not None and self.attack_rows < 1:
            raise ValueError(f"attack_rows={self.attack_rows}: at least one row is attacked (budgets=() attacks none).")
        if self.batch_size < 1 or self.keep_bytes < 0:
            raise ValueError(
                f"batch_size={self.batch_size}, keep_bytes={self.keep_bytes}: a batch has at least one row, and memory is not "
                "negative."
            )
        unknown = () if isinstance(self.starts, int) else sorted(set(self.starts) - set(self.budgets))
        if unknown:
            raise ValueError(f"starts names {unknown}, which budgets={tuple(self.budgets)} does not attack with.")

    def starts_at(self, steps: int) -> int:
        """The random starts at a budget."""
        return self.starts if isinstance(self.starts, int) else self.starts.get(steps, 1)
