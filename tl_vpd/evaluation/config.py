"""What an evaluation measures, and how much it may cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tl_vpd.checks import check_fields, integer, number, sequence
from tl_vpd.evaluation.sample import KEEP_BYTES
from tl_vpd.site import nearest

LADDER = (20, 40, 80, 160, 320, 640, 1280)
"""The standard adversary's budgets, in steps, up to those at which the paper's decomposition has long given way. They cost 2,540
steps over all attacked rows per start; the default stops at 320, which costs 620."""
BUDGETS = LADDER[:5]
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
            that they share, Δ's included (empty: no attack on the decomposition; controls have ``control_budgets``). The default
            is the beginning of ``LADDER``.
        starts: random starts of the standard adversary at each budget, or by budget (one at the others). ``pgd_kl`` gives the
            worst, with its interval over rows, ``pgd_kl_starts`` all.
        adversary_budgets: steps of the other kinds of adversary.
        attack_rows: only the first rows are attacked, which costs less (None: all).
        controls: whether the random, singular, shuffled and untrained controls are measured too.
        control_budgets: steps of the standard adversary on the controls and on ``nulls``.
        leak_rows: ``future_leakage`` is measured on the first rows.
        leak_positions: and at this many positions, spread over the rows. Each costs a clean pass over its prefix and a masked
            one for each of three modes.
        batch_size: how many rows run together; figures do not depend on it.
        seed: of all random numbers.
        curve: the target's validation curve of (step, CE), steps ascending, for compute recovered.
        keep_bytes: how much memory the targets and importances of one sample may take between passes. What does not fit is
            computed again in each pass, with the same figures.

    Raises:
        KeyError: there is no such measure.
        TypeError: a value is of another type.
        ValueError: a number is out of its range, ``starts`` names a budget that is not attacked, or the curve does not rise.
    """

    measures: Sequence[str] = MEASURES
    budgets: Sequence[int] = BUDGETS
    starts: int | Mapping[int, int] = 1
    adversary_budgets: Sequence[int] = (20, 80)
    attack_rows: int | None = None
    controls: bool = True
    control_budgets: Sequence[int] = (20,)
    leak_rows: int = 16
    leak_positions: int = 4
    batch_size: int = 16
    seed: int = 0
    curve: Sequence[Sequence[int | float]] | None = None
    keep_bytes: int = KEEP_BYTES

    def __post_init__(self) -> None:
        check_fields(
            self,
            budgets=1,
            adversary_budgets=1,
            attack_rows=1,
            control_budgets=1,
            leak_rows=1,
            leak_positions=1,
            batch_size=1,
            keep_bytes=0,
        )
        for name in self.measures:
            if name not in MEASURES:
                raise KeyError(f"{name!r} is not a measure{nearest(name, MEASURES)}. Measures: {', '.join(MEASURES)}.")
        if isinstance(self.starts, Mapping):
            starts = {integer("starts", k): integer(f"starts[{k}]", n, minimum=1) for k, n in self.starts.items()}
            object.__setattr__(self, "starts", starts)
            unknown = sorted(set(starts) - set(self.budgets))
            if unknown:
                raise ValueError(f"starts names {unknown}, which budgets={tuple(self.budgets)} does not attack with.")
        else:
            object.__setattr__(self, "starts", integer("starts", self.starts, minimum=1))
        if self.curve is not None:
            object.__setattr__(self, "curve", checked_curve(self.curve))

    def starts_at(self, steps: int) -> int:
        """The random starts at a budget."""
        return self.starts if isinstance(self.starts, int) else self.starts.get(steps, 1)


def checked_curve(curve: Any) -> tuple[tuple[float, float], ...]:
    """A validation curve as pairs of numbers.

    Args:
        curve: of (step, cross-entropy).

    Raises:
        TypeError: it is not a list of pairs of numbers.
        ValueError: a number is not finite, or steps do not rise.
    """
    points = []
    for i, point in enumerate(sequence("curve", curve)):
        if len(sequence(f"curve[{i}]", point)) != 2:
            raise ValueError(f"curve[{i}]={point!r}: give a pair of a step and a cross-entropy.")
        points.append((number(f"curve[{i}]", point[0], minimum=0), number(f"curve[{i}]", point[1])))
    if not points or points[-1][0] == 0 or any(a[0] >= b[0] for a, b in pairwise(points)):
        raise ValueError(f"curve has the steps {[p[0] for p in points]}: give steps that rise, the last above 0.")
    return tuple(points)
