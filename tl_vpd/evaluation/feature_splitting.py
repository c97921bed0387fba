"""Feature splitting: does the number of alive subcomponents stay the same when more are built?

One model is decomposed with 0.5, 1, 2 and 4 times as many subcomponents per site. Where they correspond to parts of the model,
the alive count stays flat; where a direction is split among all available subcomponents, it grows with C.

    >>> runs = decompose_at_sizes(model, tokens, config, saving=SavingConfig(folder="runs/sizes"))            # doctest: +SKIP
    >>> feature_splitting(runs, model, validation)                                                    # doctest: +SKIP

On the command line: ``tl-vpd feature-splitting recipe.yaml --factors 0.5,1,2,4 --out sizes.csv``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from jaxtyping import Bool
from torch import Tensor, nn

from tl_vpd.adapters import adapt
from tl_vpd.checks import config_of, flag, instance, number, sequence, shown
from tl_vpd.decomposition import Decomposition
from tl_vpd.evaluation.importance_statistics import ALIVE
from tl_vpd.evaluation.modes import masks_in_row
from tl_vpd.evaluation.sample import KEEP_BYTES, sampled
from tl_vpd.site import select
from tl_vpd.training import ExecutionConfig, SavingConfig, VPDConfig, decompose
from tl_vpd.training.config import counts_for
from tl_vpd.training.state import latest_state
from tl_vpd.training.stored_config import upgraded

FACTORS = (0.5, 1.0, 2.0, 4.0)


def alive_subcomponents(
    decomposition: Decomposition, model: nn.Module, tokens: Any, *, above: float = ALIVE, batch_size: int = 16
) -> dict[str, Bool[Tensor, " _"]]:
    """Which subcomponents of each site have a mean importance above a bound on these tokens.

    Args:
        decomposition: of the model.
        model: the target.
        tokens: rows, or prompts.
        above: the bound.
        batch_size: how many rows run together.

    Raises:
        TypeError: an argument is of another type.
        ValueError: a number is out of its range.
    """
    above = number("above", above, minimum=0, maximum=1)
    with sampled(decomposition, model, tokens, batch_size=batch_size, keep_bytes=0) as sample:
        return {name: mean > above for name, mean in sample.site_axis.split_sites(sample.statistics.mean).items()}


def feature_splitting(
    decompositions: Mapping[Any, Decomposition],
    model: nn.Module,
    tokens: Any,
    *,
    batch_size: int = 16,
    seed: int = 0,
    keep_bytes: int = KEEP_BYTES,
) -> pd.DataFrame:
    """A row for each decomposition of one model: built, alive (mean importance > 1e-6), L0 per token, distances of three modes.

    ``alive_growth`` is the alive count divided by the first one's; it stays near 1 unless directions are split.

    Args:
        decompositions: by name or size.
        model: the target.
        tokens: rows, or prompts.
        batch_size: how many rows run together.
        seed: of the stochastic masks.
        keep_bytes: memory for targets and importances between passes.

    Raises:
        TypeError: an argument is of another type.
        ValueError: there are no decompositions, or a number is out of its range.
    """
    if not isinstance(decompositions, Mapping) or not decompositions:
        raise ValueError(f"decompositions={shown(decompositions)}: give at least one, by name.")
    rows: list[dict[str, Any]] = []
    for name, vpd in decompositions.items():
        with sampled(vpd, model, tokens, batch_size=batch_size, seed=seed, keep_bytes=keep_bytes) as sample:
            statistics = sample.statistics
            row = {
                "decomposition": name,
                "built": sample.site_axis.total,
                "alive": int(statistics.alive.sum()),
                "l0": float(statistics.density.sum()),
            }
            modes = {mode: masks_in_row(sample, mode) for mode in ("unmasked", "stochastic", "rounded")}
            for mode, outcome in sample.outcomes(modes).items():
                row[f"{mode}_{sample.distance_name}"] = outcome.distance.mean
            rows.append(row)
    table = pd.DataFrame(rows).set_index("decomposition")
    table.insert(2, "alive_growth", table["alive"] / max(int(table["alive"].iloc[0]), 1))
    return table


def decompose_at_sizes(
    model: nn.Module,
    tokens: Any,
    config: VPDConfig,
    *,
    factors: Sequence[int | float] = FACTORS,
    execution: ExecutionConfig | None = None,
    saving: SavingConfig | None = None,
    progress: bool = True,
) -> dict[int | float, Decomposition]:
    """Decompositions with ``factor`` times the config's subcomponents at each site (at least one), everything else the same.

    Args:
        model: the target.
        tokens: as for ``decompose``.
        config: of each run, except C.
        factors: of the config's C at each site.
        execution: how each run is carried out.
        saving: its ``folder`` holds each run in ``C-{factor}``; finished runs are read, others resumed.
        progress: show a bar for each run.

    Raises:
        ValueError: a folder holds a finished run with other settings, or a factor is not above 0.
        TypeError: an argument is of another type.
        InterruptedError: a run was stopped; call again to continue (with ``saving``).
    """
    instance("config", config, VPDConfig)
    factors = [number(f"factors[{i}]", factor, above=0) for i, factor in enumerate(sequence("factors", factors))]
    sites = adapt(model).sites
    counts = counts_for(config, {name: sites[name] for name in select(config.sites, list(sites))})
    saving, progress = config_of(SavingConfig, saving), flag("progress", progress)
    decompositions: dict[int | float, Decomposition] = {}
    for factor in factors:
        scaled = config.model_copy(update={"C": {name: max(1, round(factor * n)) for name, n in counts.items()}})
        folder = None if saving.folder is None else saving.folder / f"C-{factor:g}"
        if folder is not None and (folder / "decomposition" / "decomposition.safetensors").is_file():
            stored = Decomposition.load(folder / "decomposition", device=adapt(model).device)
            if VPDConfig(**upgraded(stored.record["training"])) != VPDConfig(**scaled.model_dump()):
                raise ValueError(f"{folder} holds a run with other settings: choose another folder.")
            decompositions[factor] = stored
            continue
        resume = folder is not None and latest_state(folder / "state") is not None
        of_run = saving.model_copy(update={"folder": folder})
        run = decompose(model, tokens, scaled, execution=execution, saving=of_run, resume=resume, progress=progress)
        if not run.finished:
            raise InterruptedError(f"The run with {factor:g} times C was stopped: call again to continue.")
        decompositions[factor] = run.decomposition
    return decompositions
