"""Sparsity sweep: how good the masked model is when more or fewer subcomponents are used, threshold by threshold.

At threshold θ a token uses what has ``g > θ`` (mask 1, the rest and Δ 0). Importances that order subcomponents well give a
curve of distance against L0 far below the controls'; a steep end shows how much of the L0 the last nats cost.

    >>> sparsity_sweep(sample)                                     # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from tl_vpd.checks import check_threshold, sequence
from tl_vpd.evaluation.batch import Batch
from tl_vpd.evaluation.modes import rounded_masks
from tl_vpd.evaluation.sample import Sample, measure
from tl_vpd.masking import Masks

THRESHOLDS = (0.0, 0.01, 0.03, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9, 0.99)


@measure
def sparsity_sweep(sample: Sample, *, thresholds: Sequence[float] = THRESHOLDS) -> pd.DataFrame:
    """A row for each threshold: L0 per token, KL with its interval over rows, and for logits the cross-entropy (judge by KL).

    Args:
        sample: the rows.
        thresholds: θ.

    Raises:
        TypeError: the thresholds are not numbers in a list.
        ValueError: one is not in [0, 1], or there are none.
    """
    counts = {check_threshold(threshold): 0.0 for threshold in sequence("thresholds", thresholds)}
    if not counts:
        raise ValueError("thresholds=[]: give at least one.")

    def masks(batch: Batch, threshold: float) -> Masks:
        counts[threshold] += float((batch.g > threshold).sum())
        return rounded_masks(batch.g, sample.site_axis, threshold)

    outcomes = sample.outcomes(
        {str(t): lambda batch, threshold=t: masks(batch, threshold) for t in counts}  # type: ignore[misc]
    )
    rows = []
    for threshold, count in counts.items():
        outcome = outcomes[str(threshold)]
        row = {"threshold": threshold, "l0": count / sample.n_tokens, **outcome.distance.columns(seed=sample.seed)}
        rows.append(row if outcome.ce is None else {**row, "ce": outcome.ce.mean})
    return pd.DataFrame(rows).set_index("threshold")
