"""How attribution graphs are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from tl_vpd.checks import check_fields, choice

Fixed = Literal["norms", "deltas", "patterns"]
"""What gradients may treat as constant: norms' scales, Δs' outputs, attention patterns."""


@dataclass(frozen=True)
class GraphConfig:
    """How the graph of a prompt is made.

    Attributes:
        threshold: a subcomponent is a node where its importance exceeds this.
        min_weight: edges of at most this size are left out (0: those that are exactly 0).
        importances: False leaves g out of the edges and makes every subcomponent a node, important or not.
        fixed: what gradients do not pass: ``"norms"`` (their scales), ``"deltas"``, ``"patterns"`` (of attention).
        tokens_at_once: rows × positions of a batch of gradients, which bounds memory.
        progress: whether a bar is shown.
    """

    threshold: float = 0.0
    min_weight: float = 0.0
    importances: bool = True
    fixed: Sequence[str] = ()
    tokens_at_once: int = 1024
    progress: bool = False

    def __post_init__(self) -> None:
        check_fields(self, min_weight=0, tokens_at_once=1)
        for i, name in enumerate(self.fixed):
            choice(f"fixed[{i}]", name, get_args(Fixed))
        if self.threshold and not self.importances:
            raise ValueError(
                f"threshold={self.threshold} does nothing with importances=False, which makes every subcomponent a node."
            )


@dataclass(frozen=True)
class DatasetGraphConfig:
    """How the graph of many prompts is made.

    Attributes:
        absolute: whether the absolute version is made too.
        batch_size: prompts run at once, which bounds memory.
        progress: whether a bar is shown.
    """

    absolute: bool = True
    batch_size: int = 8
    progress: bool = False

    def __post_init__(self) -> None:
        check_fields(self, batch_size=1)
