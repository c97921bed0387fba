"""The same measures on several named sets of rows, side by side: other text, and chosen slices of the same.

A decomposition of a model's *weights* must hold wherever the model is used; one of its activations on some text need not. How
far a slice's own scale goes says its zero-ablation KL, so slices are compared by their share of it.

    >>> slices(vpd, model, {"code": code, "prose": prose, "scrambled": scrambled(model, code)})       # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from tl_vpd.adapters import adapt
from tl_vpd.decomposition import Decomposition
from tl_vpd.evaluation.adversaries import Adversary, attack
from tl_vpd.evaluation.controls import random_importances, shuffled_importances
from tl_vpd.evaluation.intervals import PerRow
from tl_vpd.evaluation.sample import ALIVE, Sample, sampled
from tl_vpd.evaluation.union_test import aggregation_by_row
from tl_vpd.masking.modes import Mode, masks_of_mode

MODES: tuple[Mode, ...] = ("unmasked", "stochastic", "rounded", "zero")


def slices(
    decomposition: Decomposition,
    model: nn.Module,
    rows: Mapping[str, Any],
    *,
    steps: int = 20,
    attack_rows: int | None = 8,
    batch_size: int = 16,
    seed: int = 0,
) -> pd.DataFrame:
    """A row a named set of rows of tokens (or prompts).

    Columns: tokens, target_ce, L0, alive; KL by mode, the rounded one with its interval and as ``share_of_zero``; ``kl_union``
    of pairs beside ``kl_alone``; ``pgd_kl`` of the shared adversary on the first rows; controls ``random`` and ``shuffled``
    under rounded masks.

    Args:
        steps: the adversary's budget (0: no attack). attack_rows: how many of the first rows it attacks (None: all).

    Raises:
        ValueError: there are no slices, or a slice does not fit the model; the message names it.
    """
    if not rows:
        raise ValueError("There are no slices: give rows of tokens by name.")
    table = []
    for name, own in rows.items():
        try:
            with sampled(decomposition, model, own, batch_size=batch_size, seed=seed) as sample:
                table.append({"slice": name, **slice_record(sample, steps=steps, attack_rows=attack_rows)})
        except (ValueError, TypeError) as error:
            raise type(error)(f"Slice {name!r}: {error}") from error
    return pd.DataFrame(table).set_index("slice")


@torch.no_grad()
def slice_record(sample: Sample, *, steps: int = 20, attack_rows: int | None = 8) -> dict[str, Any]:
    """One row of the table."""
    mean = sample.mean_importances()
    found: dict[str, Any] = {"tokens": sample.tokens_total}
    if sample.logits:
        found["target_ce"] = PerRow.joined(sample.target_ce).mean
    found["l0"] = sum(float((g > 0).sum()) for g in sample.g) / sample.tokens_total
    found["alive"] = int((mean > ALIVE).sum())
    for number, mode in enumerate(MODES):
        by_row = _under(sample, mode, sample.g, number)
        found |= by_row.columns(mode, seed=sample.seed) if mode == "rounded" else {mode: by_row.mean}
    found["share_of_zero"] = found["rounded"] / found["zero"] if found["zero"] else float("nan")
    if sum(len(t) for t in sample.tokens) >= 2:
        pairs = aggregation_by_row(sample, 2)
        found |= {"kl_alone": pairs["alone"].mean, "kl_union": pairs["union"].mean}
    if steps:
        found["pgd_kl"] = attack(sample.first(attack_rows), Adversary(steps=steps)).kl
    generators = [(sample.generator(21, i), sample.generator(22, i)) for i in range(len(sample.g))]
    random = [
        random_importances(g, mean > ALIVE, sample.site_axis, own)
        for g, (own, _) in zip(sample.g, generators, strict=True)
    ]
    shuffled = [
        shuffled_importances(g, k, own) for g, k, (_, own) in zip(sample.g, sample.token_mask, generators, strict=True)
    ]
    found["random"] = _under(sample, "rounded", random, 0).mean
    found["shuffled"] = _under(sample, "rounded", shuffled, 0).mean
    return found


def _under(sample: Sample, mode: Mode, g: list[Tensor], number: int) -> Any:
    return sample.distances(
        lambda i: masks_of_mode(mode, g[i], sample.site_axis, generator=sample.generator(20, number, i))
    )


def scrambled(model: nn.Module, tokens: Int[Tensor, "n pos"], *, seed: int = 0) -> Int[Tensor, "n pos"]:
    """The same tokens in another order in every row: off distribution wherever order matters.

    The first token stays where it is, as does padding.
    """
    token_mask = adapt(model).padding(tokens, None)
    generator = torch.Generator().manual_seed(seed)
    return torch.stack(
        [_scrambled_row(row, None if token_mask is None else token_mask[i], generator) for i, row in enumerate(tokens)]
    )


def _scrambled_row(
    row: Int[Tensor, " pos"], token_mask: Bool[Tensor, " pos"] | None, generator: torch.Generator
) -> Int[Tensor, " pos"]:
    real = torch.arange(len(row)) if token_mask is None else token_mask.nonzero()[:, 0].cpu()
    moved = real[1:]
    own = row.clone()
    own[moved] = row[moved[torch.randperm(len(moved), generator=generator)]]
    return own
