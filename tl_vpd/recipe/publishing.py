"""``tl-vpd card`` and ``tl-vpd push``: a decomposition's folder and the report that lies in it."""

from __future__ import annotations

from functools import reduce
from pathlib import Path

import torch

from tl_vpd.components.storage import FLOATS, open_folder
from tl_vpd.decomposition import Decomposition
from tl_vpd.evaluation import Evaluation
from tl_vpd.publishing.push import METRICS


def decomposition_and_report(folder: Path, report: Path | None) -> tuple[Decomposition, Evaluation | None]:
    """A decomposition in the dtype that it is stored in, and its report (None: the folder's ``metrics.json``, if any)."""
    if report is None and (folder / METRICS).exists():
        report = folder / METRICS
    evaluation = None if report is None else Evaluation.load(report)
    with open_folder(folder) as (_, file):
        stored = [dtype for dtype in file.dtypes.values() if dtype in FLOATS]
    dtype = reduce(torch.promote_types, stored) if stored else None
    return Decomposition.load(folder, dtype=dtype), evaluation
