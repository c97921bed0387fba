"""Toys decomposed for some of their features alone (arXiv 2607.13047): settings, streams, and what is to come out.

The target stream has only the chosen features; the non-target stream is the toy's ordinary data. Truth: where a site
has one subcomponent per feature, one for each chosen one; in TMS's identity as many as the chosen features' directions span; and
none important where no chosen feature is on. *Naive* is the target stream alone: no non-target losses and no decay.

    >>> toy, config = TOYS["tms_5_2_id"], targeted_recipe("tms_5_2_id")                             # doctest: +SKIP
    >>> run = decompose_targeted(model, *streams(toy, (1,), config.batch_size), config)             # doctest: +SKIP
    >>> features_report(run.decomposition, model, toy, (1,))                                        # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from torch import nn

from tl_vpd.checks import seed_of, shown
from tl_vpd.decomposition import Decomposition
from tl_vpd.forward import MaskedModel
from tl_vpd.masking import constant_masks
from tl_vpd.toys.tms import PROBE_VALUE
from tl_vpd.toys.toy import Toy
from tl_vpd.training import TargetedConfig
from tl_vpd.training.data import Batches

ROWS = 64
IMPORTANT = 0.1
"""The importance from which a subcomponent counts as important."""
_SETTINGS: dict[str, dict[str, Any]] = {
    "tms_5_2_id": {"steps": 1_500, "C": 10, "importance": 8e-3, "frequency": 4e-3, "lr": 5e-3},
    "compressed": {"steps": 4_000, "C": 10, "importance": 1e-5, "frequency": 0.0, "lr": 2e-3},
}
"""By toy: steps (a third of the whole decomposition's, or fewer) and what differs."""


def targeted_recipe(toy: str, *, seed: int = 0, steps: int | None = None, naive: bool = False) -> TargetedConfig:
    """The settings of a targeted run on a toy.

    Args:
        toy: its name.
        seed: of the decomposition.
        steps: instead of the recipe's; schedules are stretched (None: the recipe's).
        naive: whether there is the target stream alone.

    Raises:
        KeyError: the toy has no such recipe.
    """
    if not isinstance(toy, str) or toy not in _SETTINGS:
        raise KeyError(f"There is no targeted recipe for {shown(toy)}: choose from {', '.join(_SETTINGS)}.")
    settings = _SETTINGS[toy]
    weights = {"importance": settings["importance"], "frequency": settings["frequency"], "adversarial": 1.0}
    schedule = dict.fromkeys(("importance", "frequency"), ((0.0, 0.0), (0.3, 1.0)))
    alone = {"nontarget": 0.0, "nontarget_importance": 0.0} if naive else {}
    return TargetedConfig(
        steps=settings["steps"] if steps is None else steps,
        batch_size=2,
        seed=seed_of(seed),
        C=settings["C"],
        output="mse",
        gamma={"kind": "per_subcomponent_mlps", "hidden": 16, "rising": True, "output_bias": 1.0},  # type: ignore[arg-type]
        init_scale=0.3,
        coefficients={**weights, **alone, "schedule": schedule},  # type: ignore[arg-type]
        adversary={"inner_steps": 0},  # type: ignore[arg-type]
        minimality={"p": ((0.0, 2.0), (1.0, 1.0)), "frequency_reference": 32.0},  # type: ignore[arg-type]
        optimizer={"lr": settings["lr"], "lr_final": 0.0, "clip": None},  # type: ignore[arg-type]
        decay=0.0 if naive else 0.1,
    )


def streams(toy: Toy, features: Sequence[int], rows: int, *, seed: int = 0) -> tuple[Batches, Batches]:
    """The target stream, of the chosen features (from 0) of a toy of sparse features, and the toy's ordinary data."""
    target: Any = toy.batches(rows, seed=seed + 7)
    probability = 0.5 if len(features) == 1 else 1 / (len(features) + 1)
    return replace(target, probability=probability, only=tuple(features)), toy.batches(rows, seed=seed)


@torch.no_grad()
def features_report(decomposition: Decomposition, model: nn.Module, toy: Toy, features: Sequence[int]) -> pd.DataFrame:
    """By site: subcomponents important for a chosen feature alone at 0.75 (``for_target``); for how many of the other features
    any is important (``other_features``); and the squared error that ablating those of the target causes on data of the other
    features alone, relative to the mean square of the model's outputs on them (``damage``).
    """
    n = toy.batches(1).at(0).shape[-1]
    importances = decomposition.causal_importances(model, PROBE_VALUE * torch.eye(n)[:, None])
    others = [feature for feature in range(n) if feature not in features]
    rows, axis = [], decomposition.site_axis
    data = replace(toy.batches(ROWS, seed=-3), only=tuple(others)).at(0)  # type: ignore[call-arg]
    for name in decomposition.sites:
        important = importances[name][:, 0] > IMPORTANT
        ablated = important[list(features)].any(0)
        with MaskedModel(decomposition, model) as masked_model:
            output, _ = masked_model.clean(data)
            masks = torch.ones(*data.shape[:-1], axis.total)
            masks[..., axis.slices[name]] *= ~ablated
            error = masked_model.masked(data, constant_masks(masks, 1.0, axis)) - output
        rows.append(
            {
                "site": name,
                "for_target": int(ablated.sum()),
                "built": important.shape[1],
                "other_features": int(important[others].any(1).sum()),
                "others": len(others),
                "damage": float(error.square().mean() / output.square().mean()),
            }
        )
    return pd.DataFrame(rows).set_index("site")
