"""Nulls: an untrained Γ, and a model with shuffled weights.

An untrained Γ reads what the trained one reads and is a rich random map of it, so whatever is read off importances may be read
off an untrained Γ as well (``controls``, ``probe``). A model whose matrices have their entries in random order computes nothing
that was learned, with weights of the same sizes: what its decomposition looks like is what the method makes of any matrices.

    >>> null = decompose_shuffled(model, tokens, config)                                        # doctest: +SKIP
    >>> evaluate(vpd, model, tokens, nulls={"shuffled weights": null}).to_pandas("nulls")       # doctest: +SKIP
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import nn

from tl_vpd.adapters import adapt
from tl_vpd.checks import instance, seed_of
from tl_vpd.decomposition import Decomposition
from tl_vpd.evaluation.modes import masks_in_row
from tl_vpd.evaluation.sample import Sample, sampled
from tl_vpd.site import select
from tl_vpd.training import ExecutionConfig, SavingConfig, VPDConfig, decompose

Null = tuple[nn.Module, Decomposition]
"""Another model, and its decomposition."""


def untrained(decomposition: Decomposition, *, seed: int = 0) -> Decomposition:
    """The same V and U with an untrained Γ of the same shape.

    Args:
        decomposition: shares its V and U with the result.
        seed: of the untrained Γ, which is not the start of a Γ that was trained with this seed.

    Raises:
        TypeError: an argument is of another type.
        ValueError: the seed is out of its range.
    """
    instance("decomposition", decomposition, Decomposition)
    seed = zlib.crc32(f"untrained/{seed_of(seed)}".encode())
    sites, counts = list(decomposition.sites.values()), decomposition.counts
    result = Decomposition(
        sites, counts, decomposition.gamma_config, fingerprints=decomposition.fingerprints, seed=seed
    )
    result.components = decomposition.components
    result.gamma.to(next(decomposition.parameters()))
    return result


def shuffled_model(model: nn.Module, *, sites: str | Sequence[str] | None = None, seed: int = 0) -> nn.Module:
    """A copy of the model with the entries of every site's matrix in random order; embeddings, biases and norms stay.

    Args:
        model: is not changed.
        sites: patterns of the sites that are shuffled (None: all).
        seed: of the orders.

    Raises:
        KeyError: a pattern matches no site.
        TypeError: it is not a model that an adapter knows, or an argument is of another type.
        ValueError: the seed is out of its range.
    """
    generator = torch.Generator().manual_seed(seed_of(seed))
    names = select(sites, adapt(model).sites)
    with torch.inference_mode(False):  # parameters that can be trained on, whatever the caller has set
        other = copy.deepcopy(model)
        adapter = adapt(other)
        for name in names:
            W = adapter.weight(name).detach()
            order = torch.randperm(W.numel(), generator=generator).to(W.device)
            adapter.set_weight(name, W.reshape(-1)[order].reshape(W.shape))
    return other


def decompose_shuffled(
    model: nn.Module,
    tokens: Any,
    config: VPDConfig,
    *,
    seed: int = 0,
    execution: ExecutionConfig | None = None,
    saving: SavingConfig | None = None,
    progress: bool = True,
) -> Null:
    """Shuffles the weights of the config's sites and decomposes the result: a null for ``evaluate``. It costs a whole training.

    With fewer steps it is cheaper, and then to be compared with a decomposition of the real model by as few.

    Args:
        model: is not changed.
        tokens: as for ``decompose``.
        config: that of the decomposition it is compared with.
        seed: of the shuffled weights.
        execution: as for ``decompose``.
        saving: as for ``decompose``.
        progress: show a bar.

    Raises:
        TypeError, ValueError, KeyError, OSError: as ``shuffled_model`` and ``decompose``.
    """
    other = shuffled_model(model, sites=instance("config", config, VPDConfig).sites, seed=seed)
    run = decompose(other, tokens, config, execution=execution, saving=saving, progress=progress)
    return other, run.decomposition


def nulls_table(sample: Sample, nulls: Mapping[str, Null], tokens: Any, *, this: str) -> pd.DataFrame:
    """This decomposition and those of other models on the same rows: how many pieces they use, and how far off they are.

    Distances are shares of what ablating everything costs in each model, so that models are comparable.

    Args:
        sample: of the decomposition that is judged.
        nulls: by name.
        tokens: its rows.
        this: name of the first row.
    """
    rows = [{"decomposition": this, **_figures(sample)}]
    sample.store.clear()  # each null may use as much
    options: dict[str, Any] = {"batch_size": sample.batch_size, "seed": sample.seed, "keep_bytes": sample.store.limit}
    for name, (model, decomposition) in nulls.items():
        with sampled(decomposition, model, tokens, **options) as null:
            rows.append({"decomposition": name, **_figures(null)})
    return pd.DataFrame(rows).set_index("decomposition")


def check_nulls(nulls: Any, tokens: Any) -> None:
    """Refuses nulls that are not pairs of a model and its decomposition, or whose model cannot read the tokens.

    Raises:
        TypeError: it is something else.
        ValueError: the tokens do not fit the model; the message names the null.
    """
    if not isinstance(nulls, Mapping) or not all(isinstance(name, str) for name in nulls):
        raise TypeError(f"nulls is a {type(nulls).__name__}: give pairs (model, decomposition) by name, in a dict.")
    for name, null in nulls.items():
        if not isinstance(null, tuple) or len(null) != 2 or not isinstance(null[1], Decomposition):
            raise TypeError(f"Null {name!r} is a {type(null).__name__}: give a pair (model, decomposition).")
        try:
            adapt(null[0]).tokens(tokens)
        except (ValueError, TypeError) as error:
            raise type(error)(f"Null {name!r}: {error}") from error


def _figures(sample: Sample) -> dict[str, Any]:
    statistics = sample.statistics
    alive, l0 = int(statistics.alive.sum()), float(statistics.density.sum())
    modes = ("rounded", "stochastic", "zero")
    outcomes = sample.outcomes({mode: masks_in_row(sample, mode) for mode in modes})
    rounded, zero = outcomes["rounded"].distance, outcomes["zero"].distance.mean
    scale = zero or float("nan")
    return {
        "l0": l0,
        "alive": alive,
        "l0_of_alive": l0 / max(alive, 1),
        **rounded.columns("rounded", seed=sample.seed),
        "zero": zero,
        "share_of_zero": rounded.mean / scale,
        "stochastic_share": outcomes["stochastic"].distance.mean / scale,
    }
