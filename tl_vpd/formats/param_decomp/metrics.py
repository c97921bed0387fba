"""The metrics that a run reports of itself: the last line of ``metrics.jsonl``, or those in a single file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tl_vpd.files.json_files import parse_json
from tl_vpd.formats.param_decomp.files import METRICS, first_of

LEFT_OUT = ("grad_norms", "schedules")


def own_metrics(folder: Path, stored: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of the last record, without gradient norms and learning rates.

    Args:
        folder: of the run.
        stored: metrics that the checkpoint holds.

    Raises:
        ValueError: the last line is not JSON.
    """
    metrics: dict[str, Any] = dict(stored)
    path = first_of(folder, [METRICS])
    if path is not None:
        lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = parse_json(lines[-1], f"the last line of {path}") if lines else {}
        metrics |= last if isinstance(last, dict) else {}
    return {
        name: float(value)
        for name, value in metrics.items()
        if not any(part in name for part in LEFT_OUT)
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
    }
