"""Probes on importances beside their nulls: is what a probe reads off importances there because Γ was trained?

A linear probe is fitted to the same labels from several features of each token:

===========================  =======================================================================================
importances                  of the trained Γ
untrained                    the pre-sigmoid values of an untrained Γ of the same shape: a random map of the same inputs
untrained, as sparse         the same, by site less a threshold above which as many lie as importances above 0; 0 below it
shuffled                     trained importances of another token, of another row
activations                  the sites' inputs, which Γ reads
===========================  =======================================================================================

The probe is ridge regression on one-hot labels, in closed form, tokens weighted so that classes weigh the same,

    w = (Xᵀ D X + λ n I)⁻¹ Xᵀ D Y,        features standardised on training rows, λ chosen on a quarter of these,

and its score the balanced accuracy on rows that it was not fitted to (chance: one over the number of classes).

    >>> result = probe_null(vpd, model, tokens, labels)            # doctest: +SKIP
    >>> result.to_pandas(), result.check.sentence                  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_vpd.checks import instance, number
from tl_vpd.decomposition import Decomposition
from tl_vpd.evaluation.batch import Rows
from tl_vpd.evaluation.check import Check
from tl_vpd.evaluation.controls import shuffled_control
from tl_vpd.evaluation.intervals import PerRow
from tl_vpd.evaluation.nulls import untrained
from tl_vpd.evaluation.sample import Importances, Sample, measure, sampled
from tl_vpd.site import ConcatenatedAxis

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""λ."""
LEARNED, UNTRAINED = "importances", "untrained"


@dataclass(frozen=True)
class ProbeNull:
    """Balanced accuracies of the same probe on different features, by row of test tokens.

    Attributes:
        scores: by features, over test rows; a row counts by its tokens' weights.
        n_features: by features.
        chance: one over the number of classes.
        tokens: of test rows that have a label.
        seed: of the intervals.
    """

    scores: Mapping[str, PerRow]
    n_features: Mapping[str, int]
    chance: float
    tokens: int
    seed: int

    def to_pandas(self) -> pd.DataFrame:
        """A row for each kind of features: accuracy, and the gain of the trained importances over it, with intervals."""
        learned = self.scores[LEARNED]
        rows = [
            {
                "features": name,
                "n_features": self.n_features[name],
                **score.columns("accuracy", seed=self.seed),
                **learned.minus(score).columns("gain", seed=self.seed),
            }
            for name, score in self.scores.items()
        ]
        return pd.DataFrame(rows).set_index("features")

    @property
    def as_good(self) -> list[str]:
        """Features from which the probe is not shown to read less: the interval of the importances' gain reaches 0."""
        gains = self.to_pandas()["gain_low"].drop(LEARNED)
        return [str(name) for name, low in gains.items() if not low > 0]

    @property
    def check(self) -> Check:
        """Whether the importances say more than every null (a fault if not), in a sentence."""
        table = self.to_pandas()["accuracy"]
        best = str(table.drop(LEARNED).idxmax())
        value, limit = float(table[LEARNED]), float(table[best])
        what = f"the probe reads {value:.1%} from importances (chance {self.chance:.0%}), {limit:.1%} from {best}"
        bad = f"A null does as well ({', '.join(self.as_good)}): {what}."
        good = f"Importances say more than every null: {what}."
        return Check("probe", value, limit, bool(self.as_good), bad if self.as_good else good)


def probe_null(
    decomposition: Decomposition,
    model: nn.Module,
    prompts: Any,
    labels: Int[Tensor, "row pos"] | Bool[Tensor, "row pos"],
    *,
    test_share: float = 0.3,
    batch_size: int = 16,
    seed: int = 0,
) -> ProbeNull:
    """Fits the same linear probe to importances and to their nulls. Memory: labelled tokens × features, of one kind at a time.

    Args:
        decomposition: of the model.
        model: the target.
        prompts: strings or rows of tokens.
        labels: the class of each token; −1: it has none. Padding has none.
        test_share: of the rows, which the probe is judged on.
        batch_size: how many rows run together; figures do not depend on it.
        seed: of the split, the untrained Γ, the shuffling and the intervals.

    Raises:
        TypeError: an argument is of another type.
        ValueError: labels have another shape than the tokens, training or test rows do not have two classes, or the decomposition
            or the prompts do not fit the model.
    """
    instance("decomposition", decomposition, Decomposition)
    instance("labels", labels, Tensor)
    test_share = number("test_share", test_share, above=0, maximum=0.9)
    if labels.is_meta:
        raise ValueError("labels are on the meta device and have no numbers: give a tensor that has.")
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"labels are of {labels.dtype}: give integers, -1 where a token has no class.")
    with sampled(decomposition, model, prompts, batch_size=batch_size, seed=seed) as sample:
        return _probe_null(sample, decomposition, labels.long().cpu(), test_share)


@measure
def _probe_null(
    sample: Sample, decomposition: Decomposition, labels: Int[Tensor, "row pos"], test_share: float
) -> ProbeNull:
    rows = sample.rows
    if labels.shape[1:] != rows.tokens.shape[1:2] or len(labels) <= max(rows.numbers) or rows.tokens.ndim != 2:
        raise ValueError(
            f"labels are {tuple(labels.shape)}, and the tokens {tuple(rows.tokens.shape)}: give one per token."
        )
    labels = labels[rows.numbers]
    if rows.token_mask is not None:
        labels = labels.masked_fill(~rows.token_mask.cpu(), -1)
    where = labels >= 0
    row_of, y = where.nonzero()[:, 0], labels[where]
    fit, validation, test = _split(where.any(1).nonzero()[:, 0], row_of, test_share, sample.seed)
    for name, chosen in {"training": fit, "validation": validation, "test": test}.items():
        if len(y[chosen].unique()) < 2:
            raise ValueError(f"The {name} rows have labels of fewer than two classes: give prompts of more rows.")
    classes, y = y.unique(return_inverse=True)
    Y, weights = F.one_hot(y).double(), 1.0 / torch.bincount(y)[y].double()
    scores, sizes = {}, {}
    density: dict[str, float] = {}
    for name, features in _features(decomposition, sample).items():
        X = _collected(sample, features, where)
        if name == LEARNED:
            density = {site: float((g > 0).double().mean()) for site, g in sample.site_axis.split_sites(X).items()}
        variants = {name: X} | (
            {f"{name}, as sparse": _as_sparse(X, sample.site_axis, density)} if name == UNTRAINED else {}
        )
        for variant, values in variants.items():
            right = _predicted(values, Y, weights, (fit, validation), test) == y[test]
            scores[variant], sizes[variant] = _by_row(right, weights[test], row_of[test]), values.shape[1]
    return ProbeNull(scores, sizes, 1 / len(classes), int(test.sum()), sample.seed)


def _features(decomposition: Decomposition, sample: Sample) -> dict[str, Importances]:
    """What the probe may read, by name: functions of (sample, rows, clean inputs)."""
    learned, null = sample.importances, untrained(decomposition, seed=sample.seed)

    def activations(sample: Sample, rows: Rows, inputs: Mapping[str, Tensor]) -> Tensor:
        read = [inputs[name] for name in sample.site_axis.names]
        return torch.cat(list({id(x): x for x in read}.values()), dim=-1)  # Q, K and V read the same

    return {
        LEARNED: learned,
        UNTRAINED: lambda sample, rows, inputs: null.pre_sigmoid(inputs, rows.token_mask),
        "shuffled": shuffled_control(learned, sample.rows),
        "activations": activations,
    }


def _collected(sample: Sample, features: Importances, where: Bool[Tensor, "row pos"]) -> Float[Tensor, "token d"]:
    """The features of all labelled tokens, on the CPU."""
    collected = []
    for at in sample.row_slices:
        rows = sample.rows.take(at)
        collected.append(features(sample, rows, sample.clean(rows)[1]).cpu()[where[at]].double())
    return torch.cat(collected)


def _as_sparse(
    z: Float[Tensor, "token C_total"], site_axis: ConcatenatedAxis, density: Mapping[str, float]
) -> Float[Tensor, "token C_total"]:
    """``max(z − θ, 0)``, θ by site such that this share of all tokens' values is above it.

    A token's trained values in the order of the untrained Γ would be no null: how many there are says much of what was learned.
    """
    by_site = []
    for name, values in site_axis.split_sites(z).items():
        n = round(density[name] * values.numel())
        ordered = values.flatten().sort(descending=True).values
        by_site.append((values - ordered[min(n, len(ordered) - 1)]).clamp_min(0))
    return torch.cat(by_site, dim=-1)


def _split(
    labelled: Int[Tensor, " n"], row_of: Int[Tensor, " token"], test_share: float, seed: int
) -> tuple[Bool[Tensor, " token"], Bool[Tensor, " token"], Bool[Tensor, " token"]]:
    """Which tokens the probe is fitted to, its λ is chosen on, and it is judged on: whole rows."""
    order = labelled[torch.randperm(len(labelled), generator=torch.Generator().manual_seed(seed))]
    n_test = max(round(len(order) * test_share), 1)
    n_validation = max((len(order) - n_test) // 4, 1)
    parts = order[n_test + n_validation :], order[n_test:][:n_validation], order[:n_test]
    fit, validation, test = (torch.isin(row_of, rows) for rows in parts)
    return fit, validation, test


def _predicted(
    X: Float[Tensor, "token d"],
    Y: Float[Tensor, "token k"],
    weights: Float[Tensor, " token"],
    training: tuple[Bool[Tensor, " token"], Bool[Tensor, " token"]],
    test: Bool[Tensor, " token"],
) -> Int[Tensor, " test"]:
    """The classes that the probe predicts for test tokens."""
    fit, validation = training
    y = Y[validation].argmax(-1)
    right = [
        float(((X_v.argmax(-1) == y) * weights[validation]).sum())
        for X_v in _outputs(X, Y, weights, fit, validation, PENALTIES)
    ]
    best = PENALTIES[int(np.argmax(right))]
    return _outputs(X, Y, weights, fit | validation, test, [best])[0].argmax(-1)


def _outputs(
    X: Float[Tensor, "token d"],
    Y: Float[Tensor, "token k"],
    weights: Float[Tensor, " token"],
    fit: Bool[Tensor, " token"],
    at: Bool[Tensor, " token"],
    penalties: Any,
) -> list[Float[Tensor, "at k"]]:
    """Ridge regression fitted to some tokens, at others, for each λ; solved over features or over tokens, whichever are fewer."""
    w = weights[fit] / weights[fit].mean()
    total = w.sum()
    mean, target = (w @ X[fit]) / total, (w @ Y[fit]) / total
    scale = ((w @ (X[fit] - mean).square()) / total).sqrt()
    scale = torch.where(scale > 1e-6, scale, torch.inf)  # what does not vary says nothing
    A, B = w.sqrt()[:, None] * (X[fit] - mean) / scale, w.sqrt()[:, None] * (Y[fit] - target)
    n, d = A.shape
    Z = (X[at] - mean) / scale
    few = n < d
    gram = A @ A.T if few else A.T @ A
    right_side = B if few else A.T @ B
    results = []
    for penalty in penalties:
        solved = torch.linalg.solve(gram + penalty * n * torch.eye(len(gram), dtype=gram.dtype), right_side)
        results.append(Z @ (A.T @ solved if few else solved) + target)
    return results


def _by_row(right: Bool[Tensor, " test"], weights: Float[Tensor, " test"], row_of: Int[Tensor, " test"]) -> PerRow:
    """Weighted accuracy by row."""
    _, index = row_of.unique(return_inverse=True)
    total = torch.zeros(int(index.max()) + 1, dtype=torch.float64).index_add(0, index, weights)
    hits = torch.zeros_like(total).index_add(0, index, weights * right)
    return PerRow((hits / total).numpy(), total.numpy())
