"""What a targeted decomposition leaves as it is: other data, with Δ on (arXiv 2607.13047).

A targeted decomposition says nothing about other data with Δ off. It claims that there its subcomponents are hardly important,
and may be ablated, if Δ does the rest: with every Δ's mask at 1 and masks m of subcomponents,

    distance = KL(target ‖ model with m),        m drawn between the importance there and 1, rounded, or 0 for all of them

``ablated``, where all are off, is the damage that the target's subcomponents do elsewhere when they are taken out of the model.

    >>> nontarget(vpd, model, {"code": code, "prose": prose})                              # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_vpd.checks import config_of
from tl_vpd.decomposition import Decomposition
from tl_vpd.evaluation.batch import Batch
from tl_vpd.evaluation.config import EvaluationConfig
from tl_vpd.evaluation.off_distribution import check_by_name
from tl_vpd.evaluation.sample import Sample, measure, sampled
from tl_vpd.masking import Masks, constant_masks

MODES = ("stochastic", "rounded", "ablated")
WHY_NOT = "the decomposition is targeted: Δ is what its target does not use"
"""Why figures that take Δ for an error are left out."""


def nontarget(
    decomposition: Decomposition, model: nn.Module, data: Mapping[str, Any], config: EvaluationConfig | None = None
) -> pd.DataFrame:
    """A row for each named set of rows and mode, with Δ on: ``distance`` (nats, or squared error) per token, its 99th percentile
    ``p99`` and ``largest`` over tokens; ``l0`` per token, ``alive`` and ``tokens`` of the set.

    Args:
        decomposition: of the model, targeted.
        model: the target model.
        data: rows of tokens, or prompts, by name.
        config: of its settings, ``batch_size``, ``seed`` and ``keep_bytes`` are used.

    Raises:
        ValueError: there are no data, or a set does not fit the model; the message names it.
        TypeError: an argument is of another type.
    """
    check_by_name("data", data, "rows of tokens")
    if not data:
        raise ValueError("data={}: give rows of tokens by name.")
    config, table = config_of(EvaluationConfig, config), []
    options: dict[str, Any] = {"batch_size": config.batch_size, "seed": config.seed, "keep_bytes": config.keep_bytes}
    for name, rows in data.items():
        try:
            with sampled(decomposition, model, rows, **options) as sample:
                table += [{"data": name, **row} for row in _rows(sample)]
        except (ValueError, TypeError) as error:
            raise type(error)(f"Data {name!r}: {error}") from error
    return pd.DataFrame(table).set_index(["data", "mode"])


@measure
def _rows(sample: Sample) -> list[dict[str, Any]]:
    """The rows of one set."""
    distances: dict[str, list[np.ndarray]] = {mode: [] for mode in MODES}
    for batch in sample.batches():
        for mode in MODES:
            output = sample.masked(batch, _masks(sample, batch, mode))
            distances[mode].append(_by_token(sample, batch, output))
    statistics = sample.statistics
    counts = {
        "l0": float(statistics.density.sum()),
        "alive": int(statistics.alive.sum()),
        "tokens": sample.n_tokens,
    }
    table = []
    for mode, pieces in distances.items():
        values = np.concatenate(pieces)
        figures = {"distance": values.mean(), "p99": np.quantile(values, 0.99), "largest": values.max()}
        table.append({"mode": mode, **{name: float(value) for name, value in figures.items()}, **counts})
    return table


def _masks(sample: Sample, batch: Batch, mode: str) -> Masks:
    """The masks of a batch, with Δ on."""
    g = batch.g
    if mode == "stochastic":
        r = sample.uniform("nontarget", batch.rows, g.shape[1:]).to(g)
        return constant_masks(g + (1 - g) * r, 1.0, sample.site_axis)
    return constant_masks((g > 0).to(g.dtype) if mode == "rounded" else torch.zeros_like(g), 1.0, sample.site_axis)


def _by_token(sample: Sample, batch: Batch, output: Tensor) -> Float[np.ndarray, " token"]:
    """The distance from the target's output at every real token."""
    target = batch.reconstruction.target
    if sample.has_logits:
        values = (target.exp() * (target - output.float().log_softmax(-1))).sum(-1)
    else:
        values = (output.float() - target).square().mean(-1)
    mask = batch.rows.token_mask
    return (values.flatten() if mask is None else values[mask]).double().cpu().numpy()
