"""What a step measured, as runs log and store it.

>>> metrics_of({"step": 3, "total": 1.0})
Traceback (most recent call last):
ValueError: adversarial, faithfulness, frequency, grad_norm, importance, l0, lr, p, stochastic are missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class StepMetrics:
    """What a step measured, before its update. Reconstructions in nats (or squared error), ``l0`` per token."""

    step: int
    total: float
    faithfulness: float
    stochastic: float
    adversarial: float
    importance: float
    frequency: float
    l0: float
    p: float
    lr: float
    grad_norm: float
    layerwise: float = 0.0
    locality: float = 0.0


@dataclass(frozen=True)
class TargetedMetrics(StepMetrics):
    """The same of a targeted run: the fields above are of the target stream; there is no faithfulness loss, and it is 0."""

    unmasked: float = 0.0
    nontarget: float = 0.0
    nontarget_importance: float = 0.0
    nontarget_l0: float = 0.0


def metrics_of(row: Mapping[str, Any]) -> StepMetrics:
    """The metrics of a stored row, plain or targeted.

    Raises:
        ValueError: it is not a row of metrics.
    """
    kind = TargetedMetrics if "nontarget" in row else StepMetrics
    known = {f.name: f for f in fields(kind)}
    missing = sorted(name for name, f in known.items() if f.default is MISSING and name not in row)
    wrong = missing or sorted(row.keys() - known.keys())
    if wrong:
        raise ValueError(f"{', '.join(wrong)} {'are missing' if missing else 'are not metrics'}.")
    if not all(isinstance(value, int | float) for value in row.values()):
        raise ValueError("a value is not a number.")
    return kind(**{name: int(v) if known[name].type == "int" else v for name, v in row.items()})
