"""Transfer: does a site that is right alone stay right when the others are replaced as well?

Rounded masks (``g > θ``, Δ 0, importances from the clean pass) in three ways:

=================  =================================================================================================
error-propagating  every site at once: each reads what the replaced ones before it wrote
clean-input        every site at once, but each attention layer and MLP reads the target's own residual stream: W_Q, W_K,
                   W_V, W_in and W_gate see their clean inputs, and errors propagate within the layer alone
single-site        one site at a time, the others the target's
=================  =================================================================================================

Parts that are trained together to make up for each other's errors do well in the first way and fall apart in the other two.

    >>> transfer(sample)                                       # doctest: +SKIP
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from tl_vpd.evaluation.intervals import PerRow
from tl_vpd.evaluation.replacement import inputs_and_outputs, masked_product, replaced
from tl_vpd.evaluation.sample import Sample
from tl_vpd.masking import Masks
from tl_vpd.masking.modes import masks_of_mode

READERS = ("q", "k", "v", "in", "gate")
"""Short names of the sites of a block that read the residual stream."""


@torch.no_grad()
def transfer(sample: Sample, *, threshold: float = 0.0, single_sites: bool = True) -> pd.DataFrame:
    """A row a way of replacing (single sites by name, and their mean): KL with its interval, for logits the cross-entropy.

    Models that are no stack of blocks have no clean-input row.
    """

    def masks(i: int) -> Masks:
        return masks_of_mode("rounded", sample.g[i], sample.site_axis, threshold=threshold)

    rows = [_row("error-propagating", *sample.outcome(masks), seed=sample.seed)]
    if any(site.home != site.name for site in sample.weights.sites.values()):
        parts = [sample.distance(i, clean_input_output(sample, i, masks(i))) for i in range(len(sample.tokens))]
        rows.append(_row("clean-input", PerRow.joined(parts), None, seed=sample.seed))
    if single_sites:
        alone = {name: sample.outcome(lambda i, own=name: masks(i).only([own])) for name in sample.site_axis.names}  # type: ignore[misc]
        by_site = [kl for kl, _ in alone.values()]
        mean = PerRow(np.mean([kl.values for kl in by_site], axis=0), by_site[0].tokens)
        rows.append(_row("single-site, mean", mean, None, seed=sample.seed))
        rows += [_row(f"single-site, {name}", kl, ce, seed=sample.seed) for name, (kl, ce) in alone.items()]
    return pd.DataFrame(rows).set_index("replaced")


def _row(name: str, kl: PerRow, ce: PerRow | None, *, seed: int) -> dict[str, float | str]:
    row: dict[str, float | str] = {"replaced": name, **kl.columns(seed=seed)}
    return row if ce is None else {**row, "ce": ce.mean}


@torch.no_grad()
def clean_input_output(sample: Sample, i: int, masks: Masks) -> Tensor:
    """The output on a batch when every site is masked and every layer reads the target's own residual stream."""
    masked_model, tokens, token_mask = sample.masked_model, sample.tokens[i], sample.token_mask[i]
    inputs, outputs = inputs_and_outputs(masked_model, tokens, token_mask)

    def replace(name: str, x: Tensor, y: Tensor) -> Tensor:
        if sample.weights.sites[name].short in READERS:
            x, y = inputs[name], outputs[name]
        return masked_product(masked_model, name, x, y, masks[name])

    return replaced(masked_model, tokens, token_mask, replace)
