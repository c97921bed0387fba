"""``cluster``: from a decomposition and texts to components; ``cluster_ensemble``: with several α and seeds, and the null."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from tl_vpd.analysis.clustering.clustering import Clustering
from tl_vpd.analysis.clustering.merging import merge
from tl_vpd.analysis.clustering.patterns import Patterns, importance_patterns, is_of
from tl_vpd.checks import check_fields, config_of, instance, number, seed_of, sequence
from tl_vpd.decomposition import Decomposition


@dataclass(frozen=True)
class ClusterConfig:
    """How subcomponents are merged.

    Attributes:
        alpha: bits per rank and token, which sets the resolution: two equally frequent subcomponents of k merge if
            ``alpha < co / (1 − co) · log2(k) / 2``, where co is their Jaccard index. The larger, the smaller the components.
        threshold: a subcomponent is important where its importance exceeds this.
        greed: of all pairs, ranked by the change of the description length, the pair of rank n is merged with probability
            ∝ ``e^(−greed · n)``.
        seed: of these choices.
        lags: members of a component may be important up to this many tokens apart (0: at one token). Each pair of groups is
            merged at the lag at which they are most often important together.
        batch_size: rows run at once.

    Raises:
        TypeError: a value is of another type.
        ValueError: a value is out of range.
    """

    alpha: float = 1.0
    threshold: float = 0.01
    greed: float = 0.2
    seed: int = 0
    lags: int = 0
    batch_size: int = 32

    def __post_init__(self) -> None:
        check_fields(self, alpha=0, lags=(0, 64), batch_size=1)
        number("greed", self.greed, above=0)


def cluster(
    decomposition: Decomposition,
    model: nn.Module,
    prompts: Any,
    *,
    config: ClusterConfig | None = None,
) -> Clustering:
    """Groups the subcomponents that are important at the same tokens (VPD paper, clustering of subcomponents).

    Runs on the CPU once the importances are known; 2,000 subcomponents on 20,000 tokens need a few seconds.

    Args:
        decomposition: of the model's weights.
        model: the target.
        prompts: strings, or rows of tokens ``[n, pos]``, the more the better; padding is left out. ``Patterns``
            (``importance_patterns``) of the same decomposition save the passes of a second call.
        config: resolution and randomness (None: the defaults).

    Raises:
        TypeError: an argument is of another type.
        ValueError: the prompts are not this model's, it has other weights, or no subcomponent is important anywhere.
    """
    instance("decomposition", decomposition, Decomposition)
    config = config_of(ClusterConfig, config)
    return clustered(_patterns(decomposition, model, prompts, config), config)


def clustered(patterns: Patterns, config: ClusterConfig) -> Clustering:
    """Components of patterns."""
    options = {name: getattr(config, name) for name in ("alpha", "greed", "seed", "lags")}
    history = merge(patterns.important, **options, lengths=patterns.lengths)
    settings = options | {"threshold": patterns.threshold, "norms": dict(patterns.norms)}
    counts = np.diff(patterns.important.indptr).astype(np.int64)
    rest = patterns.chosen, counts, patterns.n_tokens, patterns.site_axis, settings
    return Clustering(history, history.shortest, *rest)


@dataclass(frozen=True)
class ClusterEnsemble:
    """Clusterings of the same importances with several α and seeds, and of shuffled ones.

    Attributes:
        clusterings: by (alpha, seed).
        null: by alpha, of ``Patterns.shuffled``: components of several members there are chance.
    """

    clusterings: dict[tuple[float, int], Clustering]
    null: dict[float, Clustering]

    def to_pandas(self) -> pd.DataFrame:
        """One row per α: components, those of several members, the largest, bits per token; the null's; the distance of seeds.

        ``distance`` is the mean variation of information between seeds, in bits (None: there is one seed).
        """
        rows = []
        for alpha, null in self.null.items():
            runs = [c for (a, _), c in self.clusterings.items() if a == alpha]
            distances = [variation_of_information(a.partition, b.partition) for a, b in combinations(runs, 2)]
            rows.append(
                {
                    "alpha": alpha,
                    "components": np.mean([len(c) for c in runs]),
                    "of_several": np.mean([_of_several(c) for c in runs]),
                    "largest": np.mean([max(len(x.members) for x in c) for c in runs]),
                    "bits_per_token": np.mean([c.history.description_length[c.merges] / c.n_tokens for c in runs]),
                    "null_of_several": _of_several(null),
                    "distance": np.mean(distances) if distances else None,
                }
            )
        return pd.DataFrame(rows)


def cluster_ensemble(
    decomposition: Decomposition,
    model: nn.Module,
    prompts: Any,
    *,
    alphas: Sequence[float] = (0.3, 1.0, 3.0, 10.0),
    seeds: Sequence[int] = (0, 1, 2),
    config: ClusterConfig | None = None,
) -> ClusterEnsemble:
    """Clusters at several resolutions and with several seeds, and shuffled importances beside them.

    Args:
        decomposition: of the model's weights.
        model: the target.
        prompts: as for ``cluster``.
        alphas: each replaces ``config.alpha``.
        seeds: each replaces ``config.seed``.
        config: all else (None: the defaults).

    Raises:
        TypeError: an argument is of another type.
        ValueError: as for ``cluster``, or there are no alphas or seeds.
    """
    instance("decomposition", decomposition, Decomposition)
    config = config_of(ClusterConfig, config)
    resolutions = [number("alphas", alpha, minimum=0) for alpha in sequence("alphas", alphas)]
    starts = [seed_of(seed, name="seeds") for seed in sequence("seeds", seeds)]
    if not resolutions or not starts:
        raise ValueError("alphas and seeds must each have at least one number.")
    patterns = _patterns(decomposition, model, prompts, config)
    null, made = patterns.shuffled(config.seed), {}
    for alpha in resolutions:
        for seed in starts:
            made[alpha, seed] = clustered(patterns, replace(config, alpha=alpha, seed=seed))
    first = replace(config, seed=starts[0])
    return ClusterEnsemble(made, {alpha: clustered(null, replace(first, alpha=alpha)) for alpha in resolutions})


def variation_of_information(a: Any, b: Any) -> float:
    """The distance of two partitions of the same things, ``H(a | b) + H(b | a)`` in bits: 0 where they are equal.

    Args:
        a: the group of every thing, integers ``[n]``.
        b: the same of the other partition.

    Raises:
        ValueError: they are of different lengths, or empty.
    """
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"The partitions have the shapes {a.shape} and {b.shape}: give groups of the same things.")
    joint = np.stack([np.unique(a, return_inverse=True)[1], np.unique(b, return_inverse=True)[1]])
    entropies = [_entropy(joint[:1]), _entropy(joint[1:]), _entropy(joint)]
    return max(0.0, 2 * entropies[2] - entropies[0] - entropies[1])


def _entropy(columns: np.ndarray) -> float:
    p = np.unique(columns, axis=1, return_counts=True)[1] / columns.shape[1]
    return float(-(p * np.log2(p)).sum())


def _of_several(clustering: Clustering) -> int:
    return sum(len(component.members) > 1 for component in clustering)


def _patterns(decomposition: Decomposition, model: nn.Module, prompts: Any, config: ClusterConfig) -> Patterns:
    """The patterns of prompts, or these, if they are of this decomposition and threshold."""
    if not isinstance(prompts, Patterns):
        threshold, rows = config.threshold, config.batch_size
        return importance_patterns(decomposition, model, prompts, threshold=threshold, batch_size=rows)
    same = prompts.site_axis.counts == decomposition.counts and is_of(prompts.norms, decomposition)
    if not same or prompts.threshold != config.threshold:
        raise ValueError(
            f"The patterns are of another decomposition or threshold ({prompts.threshold:g}, and config.threshold is "
            f"{config.threshold:g})."
        )
    return prompts
