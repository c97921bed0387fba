"""Mask transfer: does a site that is right alone stay right when the others are replaced as well?

Rounded masks (``g > θ``, Δ 0, importances from the clean pass) in three ways:

=================  =================================================================================================
error-propagating  every site at once: each reads what the replaced ones before it wrote
clean-input        every site at once, but each attention layer and MLP reads the target's residual stream: W_Q, W_K,
                   W_V, W_in and W_gate get their clean inputs, and errors propagate only within the layer
single-site        one site at a time, the others the target's
=================  =================================================================================================

Sites that were trained together to make up for each other's errors do well in the first way and badly in the other two.

    >>> mask_transfer(sample)                                       # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from torch import Tensor

from tl_vpd.checks import check_threshold, flag
from tl_vpd.evaluation.batch import Batch
from tl_vpd.evaluation.intervals import PerRow
from tl_vpd.evaluation.modes import rounded
from tl_vpd.evaluation.sample import Sample, measure
from tl_vpd.forward import SitePass
from tl_vpd.masking import Masks

READERS = ("q", "k", "v", "in", "gate")
"""Short names of the sites of a block that read the residual stream."""


@measure
def mask_transfer(sample: Sample, *, threshold: float = 0.0, single_sites: bool = True) -> pd.DataFrame:
    """A row for each way of replacing (single sites by name, and their mean): KL with its interval, for logits the cross-entropy.

    Models that are not a stack of blocks have no clean-input row.

    Args:
        sample: the rows.
        threshold: θ.
        single_sites: whether sites are also replaced one at a time.
    """
    masks = rounded(sample, check_threshold(threshold))
    outputs: dict[str, Callable[[Batch], Tensor]] = {
        "error-propagating": lambda batch: sample.output(batch, masks(batch))
    }
    if any(site.home != site.name for site in sample.masked_model.weights.sites.values()):
        outputs["clean-input"] = lambda batch: clean_input_output(sample, batch, masks(batch))
    names = sample.site_axis.names if flag("single_sites", single_sites) else []
    for name in names:
        outputs[f"single-site, {name}"] = lambda batch, site=name: sample.output(batch, masks(batch).only([site]))  # type: ignore[misc]
    outcomes = sample.outcomes_of(outputs)
    rows = []
    for name, outcome in outcomes.items():
        row: dict[str, float | str] = {"replaced": name, **outcome.distance.columns(seed=sample.seed)}
        if outcome.ce is not None and name != "clean-input":
            row["ce"] = outcome.ce.mean
        rows.append(row)
    if names:
        by_site = [outcomes[f"single-site, {name}"].distance for name in names]
        mean = PerRow(np.mean([kl.values for kl in by_site], axis=0), by_site[0].tokens)
        rows.insert(-len(names), {"replaced": "single-site, mean", **mean.columns(seed=sample.seed)})
    return pd.DataFrame(rows).set_index("replaced")


def clean_input_output(sample: Sample, batch: Batch, masks: Masks) -> Tensor:
    """The output on a batch when sites are masked and each of their layers reads the target's residual stream."""
    masked_model, rows = sample.masked_model, batch.rows
    clean: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str, x: Tensor, y: Tensor) -> None:
        clean[name] = x, y

    def replace(name: str, x: Tensor, y: Tensor) -> Tensor | None:
        if name not in masks:
            return None
        if masked_model.weights.sites[name].short in READERS:
            x, y = clean[name]
        return masked_model.product(name, x, y).masked(masks[name])

    masked_model.run(rows.tokens, SitePass(note), rows.token_mask)
    return masked_model.run(rows.tokens, SitePass(replace), rows.token_mask)
