"""The same measures on several named sets of rows, side by side: other text, and chosen parts of the same text.

A decomposition of a model's *weights* must hold wherever the model is used; one of its activations on some text need not. The
zero-ablation KL gives each set's scale, so sets are compared by their share of it.

    >>> off_distribution(vpd, model, {"code": code, "prose": prose, "scrambled": scrambled(model, code)})       # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from tl_vpd.adapters import adapt
from tl_vpd.checks import config_of, seed_of
from tl_vpd.decomposition import Decomposition
from tl_vpd.evaluation.adversaries import Adversary, attack
from tl_vpd.evaluation.batch import BatchStore
from tl_vpd.evaluation.config import EvaluationConfig
from tl_vpd.evaluation.controls import random_control, shuffled_control
from tl_vpd.evaluation.modes import masks_in_row, rounded
from tl_vpd.evaluation.sample import Sample, measure, sampled
from tl_vpd.evaluation.union_test import union_distances

MODES = ("unmasked", "stochastic", "rounded", "zero")


def off_distribution(
    decomposition: Decomposition, model: nn.Module, data: Mapping[str, Any], config: EvaluationConfig | None = None
) -> pd.DataFrame:
    """A row for each named set of rows of tokens (or prompts).

    Columns: tokens, target_ce, L0, alive; KL by mode, the rounded one with its interval and as ``share_of_zero``; ``kl_union``
    of pairs beside ``kl_alone``; ``pgd_kl`` of the shared adversary on the first rows; controls ``random`` and ``shuffled`` under
    rounded masks.

    Args:
        decomposition: of the model.
        model: the target.
        data: rows of tokens, or prompts, by name.
        config: of its settings, ``attack_rows``, ``batch_size``, ``seed``, ``keep_bytes`` and the smallest of ``budgets`` (empty:
            no attack) are used (None: 20 steps on the first 8 rows).

    Raises:
        ValueError: there are no data, or a set does not fit the model; the message names it.
        TypeError: an argument is of another type.
    """
    check_by_name("data", data, "rows of tokens")
    if not data:
        raise ValueError("data={}: give rows of tokens by name.")
    config = config_of(EvaluationConfig, EvaluationConfig(budgets=(20,), attack_rows=8) if config is None else config)
    adversary = Adversary(steps=min(config.budgets)) if config.budgets else None
    options: dict[str, Any] = {"batch_size": config.batch_size, "seed": config.seed, "keep_bytes": config.keep_bytes}
    table = []
    for name, rows in data.items():
        try:
            with sampled(decomposition, model, rows, **options) as sample:
                table.append({"data": name, **data_record(sample, adversary, config.attack_rows)})
        except (ValueError, TypeError) as error:
            raise type(error)(f"Data {name!r}: {error}") from error
    return pd.DataFrame(table).set_index("data")


def check_by_name(argument: str, value: Any, what: str) -> None:
    """Raises TypeError unless an argument has things by name."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise TypeError(f"{argument} is a {type(value).__name__}: give {what} by name, in a dict.")


@measure
def data_record(sample: Sample, adversary: Adversary | None, attack_rows: int | None) -> dict[str, Any]:
    """One row of the table.

    Args:
        sample: the rows.
        adversary: attacks the first rows (None: no attack).
        attack_rows: how many (None: all).
    """
    record: dict[str, Any] = {"tokens": sample.n_tokens}
    if sample.target_ce is not None:
        record["target_ce"] = sample.target_ce.mean
    record["l0"] = float(sample.statistics.density.sum())
    record["alive"] = int(sample.statistics.alive.sum())
    for mode, outcome in sample.outcomes({mode: masks_in_row(sample, mode) for mode in MODES}).items():
        kl = outcome.distance
        record |= kl.columns(mode, seed=sample.seed) if mode == "rounded" else {mode: kl.mean}
    record["share_of_zero"] = record["rounded"] / record["zero"] if record["zero"] else float("nan")
    if len(sample.rows) >= 2:
        pairs = union_distances(sample, 2)
        record |= {"kl_alone": pairs.alone.mean, "kl_union": pairs.union.mean}
    if adversary is not None:
        record["pgd_kl"] = attack(sample.first(attack_rows), adversary).kl
    controls = {
        "random": random_control(sample.importances, sample.statistics.alive),
        "shuffled": shuffled_control(sample.importances, sample.rows),
    }
    for name, importances in controls.items():
        control = replace(sample, importances=importances, store=BatchStore(0))
        record[name] = control.distances(rounded(control)).mean
    return record


def scrambled(model: nn.Module, tokens: Any, *, seed: int = 0) -> Int[Tensor, "n pos"]:
    """The same tokens in another order in every row: off distribution wherever order matters.

    The first token stays in its place, as does padding.

    Args:
        model: says what is padding.
        tokens: rows.
        seed: of the orders.
    """
    tokens = adapt(model).tokens(tokens)
    token_mask = adapt(model).padding(tokens, None)
    generator = torch.Generator().manual_seed(seed_of(seed))
    return torch.stack(
        [_scrambled_row(row, None if token_mask is None else token_mask[i], generator) for i, row in enumerate(tokens)]
    )


def _scrambled_row(
    row: Int[Tensor, " pos"], token_mask: Bool[Tensor, " pos"] | None, generator: torch.Generator
) -> Int[Tensor, " pos"]:
    real = torch.arange(len(row)) if token_mask is None else token_mask.nonzero()[:, 0].cpu()
    moved = real[1:]
    result = row.clone()
    result[moved] = row[moved[torch.randperm(len(moved), generator=generator)]]
    return result
