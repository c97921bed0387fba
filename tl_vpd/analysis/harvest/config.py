"""What a harvest collects, and within how much memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tl_vpd.checks import check_fields

RUNNING = ("batch_size", "memory", "first_row")
"""Fields that say how a harvest runs; the others say what it is."""


@dataclass(frozen=True)
class HarvestConfig:
    """What a harvest collects, and how many rows run at once.

    Attributes:
        windows: windows per subcomponent, at most one per row, in order of the largest importance.
        radius: tokens shown on each side of a window's peak.
        threshold: a subcomponent fires where g exceeds this.
        batch_size: rows run at once, fewer where ``memory`` is too small for them.
        bins: of a histogram of every subcomponent's importances above 0, of equal width in (0, 1] (0: none is made).
        samples: windows per subcomponent around random firings, at most one per row.
        seed: of these.
        lags: pairs of subcomponents that fire up to this many positions apart are counted (0: at one position; None: none
            are).
        memory: bytes for all that a harvest holds beside the model's and Γ's own passes, whatever the number of rows.
        first_row: the number of the first row, where the rows are one of several parts whose harvests are merged.

    Raises:
        TypeError: a value is of another type.
        ValueError: a value is out of range, or a seed comes without samples.
    """

    windows: int = 8
    radius: int = 20
    threshold: float = 0.1
    batch_size: int = 32
    bins: int = 0
    samples: int = 0
    seed: int = 0
    lags: int | None = None
    memory: int = 1 << 30
    first_row: int = 0

    def __post_init__(self) -> None:
        check_fields(self, windows=1, radius=0, batch_size=1, bins=0, samples=0, lags=0, memory=1, first_row=0)
        if self.threshold == 1:
            raise ValueError("threshold=1: no importance exceeds 1, give a number of at least 0 and below 1.")
        if self.seed and not self.samples:
            raise ValueError(f"seed={self.seed} does nothing without samples: give how many random windows are wanted.")

    def what(self) -> dict[str, Any]:
        """What two harvests must have in common to be one."""
        return {name: value for name, value in asdict(self).items() if name not in RUNNING}
