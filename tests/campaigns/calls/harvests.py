"""Calls of harvests at scale: folders, parts, logits and the dashboard."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pandas as pd

from tests.campaigns.calls.kinds import Kind, how_many, integer, only, optional, path_to_read, text
from tests.campaigns.calls.world import OUT, Call, Q, World, call
from tl_vpd import analysis, viz

AT_SCALE = analysis.HarvestConfig(windows=2, radius=2, samples=2, lags=1)


def calls(w: World) -> list[Call]:
    """The table."""
    numbers = count()

    def pages(**options: Any) -> None:
        viz.dashboard(**{"folder": w.folder / f"pages{next(numbers)}", **options})

    def pages_in(folder: Any) -> None:
        pages(folder=folder, decomposition=w.vpd, model=w.model, harvested=first)
        shutil.rmtree(folder)  # the next call gets the same

    new: Kind = lambda v: None if isinstance(v, str | Path) else False  # noqa: E731
    first = analysis.harvest(w.vpd, w.model, w.tokens, config=AT_SCALE)
    second = analysis.harvest(w.vpd, w.model, w.tokens, config=replace(AT_SCALE, first_row=2))
    saved, one = first.save(w.folder / "saved_harvest"), first[f"{Q}:1"]
    target = {
        "decomposition": (w.vpd, only(w.vpd)),
        "model": (w.model, only(w.model)),
        "harvested": (first, only(first)),
    }
    table = pd.DataFrame({"subcomponent": [f"{Q}:1"], "label": ["a label"], "score": [0.5]})
    data = viz.DashboardData(labels=table, prompts=w.tokens)
    return [
        call(
            analysis.harvest,
            "analysis: harvest(folder)",
            **w.of_prompts,
            folder=(w.folder / "harvested", lambda v: None if v is None else new(v)),
        ),
        call(analysis.merge, first=(first, only(first)), second=(second, only(second))),
        call(
            analysis.logit_effects,
            **w.target,
            subcomponents=([f"{OUT}:2"], lambda v: None if v is None or w.several(v) else w.several(v)),
            k=(3, integer(1)),
        ),
        call(one.neighbours, k=(3, how_many), min_count=(1, how_many)),
        call(one.by_quantile, n=(2, integer(1))),
        call(analysis.Harvest.load, folder=(saved, path_to_read(saved))),
        call(pages, "viz: dashboard", **target, data=(data, optional(only(data))), config=_config()),
        call(
            lambda **o: vars(viz.DashboardData(**o)),
            "viz: DashboardData",
            labels=(table, lambda v: None),
            clustering=(None, only(None)),
            graph=(None, only(None)),
            ablations=(None, only(None)),
            prompts=(w.tokens, lambda v: None),
        ),
        call(pages_in, "viz: dashboard(folder)", folder=(w.folder / "pages", new)),
        call(
            viz.DashboardConfig,
            title=("A title", text),
            logits=(3, integer(1)),
            min_count=(3, integer(1)),
            per_token=(3, integer(1)),
            **{
                name: (3, integer(0))
                for name in ("windows", "samples", "radius", "tokens", "neighbours", "edges", "heads")
            },
        ),
    ]


def _config() -> tuple[Any, Kind]:
    return viz.DashboardConfig(windows=1), lambda v: v is None or isinstance(v, viz.DashboardConfig)
