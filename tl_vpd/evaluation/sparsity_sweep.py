"""Variable resolution: how good the masked model is when more or less is kept, threshold by threshold.

At threshold θ a token keeps what has ``g > θ`` (mask 1, the rest and Δ 0). Importances that order subcomponents well give a
curve of distance against L0 that lies far below the controls'; a steep end says how much of the L0 the last nats cost.

    >>> resolution(sample)                                     # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch

from tl_vpd.evaluation.sample import Sample
from tl_vpd.masking.modes import masks_of_mode

THRESHOLDS = (0.0, 0.01, 0.03, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9, 0.99)


@torch.no_grad()
def resolution(sample: Sample, *, thresholds: Sequence[float] = THRESHOLDS) -> pd.DataFrame:
    """A row a threshold: L0 a token, KL with its interval over rows, and for logits the cross-entropy (judge by KL)."""
    rows = []
    for threshold in thresholds:
        kl, ce = sample.outcome(
            lambda i, own=threshold: masks_of_mode("rounded", sample.g[i], sample.site_axis, threshold=own)  # type: ignore[misc]
        )
        kept = sum(float((g > threshold).sum()) for g in sample.g) / sample.tokens_total
        row = {"threshold": threshold, "l0": kept, **kl.columns(seed=sample.seed)}
        rows.append(row if ce is None else {**row, "ce": ce.mean})
    return pd.DataFrame(rows).set_index("threshold")
