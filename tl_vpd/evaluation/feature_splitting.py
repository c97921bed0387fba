"""Splitting: does the number of living subcomponents stay what it is when more are built?

One model is taken apart with 0.5, 1, 2 and 4 times as many subcomponents a site. Where they stand for what the model has, the
alive count stays flat; where a direction is split among whatever there is, it grows with C.

    >>> found = train_sizes(model, tokens, VPDConfig(steps=2_000), saving=SavingConfig(folder="runs/sizes"))  # doctest: +SKIP
    >>> sizes(found, model, validation)                                                       # doctest: +SKIP

On the command line: ``tl-vpd feature-splitting recipe.yaml --factors 0.5,1,2,4 --out sizes.csv``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor, nn

from tl_vpd.adapters import adapt
from tl_vpd.decomposition import Decomposition
from tl_vpd.evaluation.sample import ALIVE, sampled
from tl_vpd.masking.modes import masks_of_mode
from tl_vpd.site import select
from tl_vpd.training import ExecutionConfig, SavingConfig, VPDConfig, decompose
from tl_vpd.training.config import counts_for, upgraded
from tl_vpd.training.state import latest_state

FACTORS = (0.5, 1.0, 2.0, 4.0)


def alive_of(
    decomposition: Decomposition, model: nn.Module, tokens: Any, *, above: float = ALIVE, batch_size: int = 16
) -> dict[str, Bool[Tensor, " _"]]:
    """Which subcomponents of each site have a mean importance above a bound on these tokens."""
    with sampled(decomposition, model, tokens, batch_size=batch_size) as sample:
        return {name: own > above for name, own in sample.site_axis.split_sites(sample.mean_importances()).items()}


@torch.no_grad()
def sizes(
    decompositions: Mapping[Any, Decomposition], model: nn.Module, tokens: Any, *, batch_size: int = 16
) -> pd.DataFrame:
    """A row a decomposition of one model: built, alive (mean importance > 1e-6), L0 a token, distances of three modes.

    ``alive_growth`` is the alive count over the first one's: flat near 1 is what is hoped for.
    """
    rows: list[dict[str, Any]] = []
    for name, own in decompositions.items():
        with sampled(own, model, tokens, batch_size=batch_size) as sample:
            alive = int((sample.mean_importances() > ALIVE).sum())
            l0 = sum(float((g > 0).sum()) for g in sample.g) / sample.tokens_total
            row = {"size": name, "built": own.site_axis.total, "alive": alive, "l0": l0}
            for number, mode in enumerate(("unmasked", "stochastic", "rounded")):
                found = sample.distances(
                    lambda i, mode=mode, number=number: masks_of_mode(  # type: ignore[misc]
                        mode, sample.g[i], sample.site_axis, generator=sample.generator(number, i)
                    )
                )
                row[f"{mode}_{sample.measure}"] = found.mean
            rows.append(row)
    table = pd.DataFrame(rows).set_index("size")
    table.insert(2, "alive_growth", table["alive"] / max(int(table["alive"].iloc[0]), 1))
    return table


def train_sizes(
    model: nn.Module,
    tokens: Any,
    config: VPDConfig,
    *,
    factors: Sequence[int | float] = FACTORS,
    execution: ExecutionConfig | None = None,
    saving: SavingConfig | None = None,
    progress: bool = True,
) -> dict[int | float, Decomposition]:
    """Decompositions with ``factor`` times the config's subcomponents at each site (at least one), all else alike.

    Args:
        model: the target.
        tokens: as for ``decompose``.
        config: of each run, but for C.
        factors: of the config's C at each site.
        execution: how each run is carried out.
        saving: its ``folder`` holds each run in ``C-{factor}``; finished runs are read, others resumed.
        progress: show a bar for each run.

    Raises:
        ValueError: a folder holds a finished run with other settings.
        InterruptedError: a run was stopped; call again to go on (with ``saving``).
    """
    sites = adapt(model).sites
    chosen = {name: sites[name] for name in select(config.sites, list(sites))}
    counts = counts_for(config, chosen)
    found: dict[int | float, Decomposition] = {}
    for factor in factors:
        scaled = config.model_copy(update={"C": {name: max(1, round(factor * n)) for name, n in counts.items()}})
        saving = saving or SavingConfig()
        folder = None if saving.folder is None else saving.folder / f"C-{factor:g}"
        if folder is not None and (folder / "decomposition" / "config.json").is_file():
            found[factor] = Decomposition.load(folder / "decomposition", device=adapt(model).device)
            if VPDConfig(**upgraded(found[factor].record["training"])) != VPDConfig(**scaled.model_dump()):
                raise ValueError(f"{folder} holds a run with other settings: choose another folder.")
            continue
        resume = folder is not None and latest_state(folder / "state") is not None
        each = saving.model_copy(update={"folder": folder})
        run = decompose(model, tokens, scaled, execution=execution, saving=each, resume=resume, progress=progress)
        if not run.finished:
            raise InterruptedError(f"The run with {factor:g} times C was stopped: call again to go on.")
        found[factor] = run.decomposition
    return found
