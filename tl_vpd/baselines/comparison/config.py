"""What ``compare`` measures, and what artefacts cost to train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tl_vpd.checks import check_fields

WAYS = ("error-propagating", "clean-input", "single-layer")


@dataclass(frozen=True)
class ComparisonConfig:
    """Settings of ``compare``.

    Args:
        thresholds: of decompositions' importances; each is a row of its own.
        budgets: steps of the attack on what is inactive, each with ``step_size = 2 / steps`` (empty: no attack).
        attack_rows: only the first rows are attacked (None: all).
        batch_size: how many rows run together; figures do not depend on it.
        seed: of the attack's start and of intervals.

    Raises:
        TypeError: a value is of another type.
        ValueError: a number is out of its range, or there is no threshold.
    """

    thresholds: Sequence[float] = (0.0,)
    budgets: Sequence[int] = (20,)
    attack_rows: int | None = None
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self, thresholds=(0, 1), budgets=1, attack_rows=1, batch_size=1)
        if not self.thresholds:
            raise ValueError("thresholds=(): give at least one.")


@dataclass(frozen=True)
class TrainingCost:
    """What an artefact took to train; transcoders of ``train_transcoders`` have it in their record.

    Args:
        flops: of matrix products (``tl_vpd.planning.footprint`` gives those of a decomposition's step).
        seconds: on the machine at hand (None: not known).

    Raises:
        TypeError: a value is of another type.
        ValueError: it is below 0.
    """

    flops: float
    seconds: float | None = None

    def __post_init__(self) -> None:
        check_fields(self, flops=0, seconds=0)
