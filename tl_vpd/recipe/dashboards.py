"""``tl-vpd dashboard``: a decomposition, a model and tokens by name, and a folder of pages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from tl_vpd.analysis import (
    AblationTableConfig,
    ClusterConfig,
    Clustering,
    DatasetGraphConfig,
    HarvestConfig,
    Labels,
    ablation_table,
    cluster,
    dataset_graph,
    harvest,
)
from tl_vpd.checks import path_of
from tl_vpd.decomposition import Decomposition
from tl_vpd.recipe.named import Named
from tl_vpd.viz import DashboardConfig, DashboardData, dashboard

COMPONENT_ROWS = 128
"""Rows that components are made from: their merging keeps all pairs of tokens and subcomponents in memory."""
ABLATED_ROWS, PROMPT_TOKENS = 2, 64
"""Prompts on which each subcomponent is ablated in turn, and the longest prompt that is shown."""


@dataclass(frozen=True)
class Pages:
    """What the pages show beside a harvest.

    Attributes:
        alpha: of the components (0: there are none).
        components: a file of ``Clustering.save`` (None: they are made).
        labels: a file of ``Labels.save`` (.json), or of a table with the columns ``subcomponent`` and ``label`` and any columns
            of numbers (.csv).
        graph_rows: rows of the graph of edges (0: there is none).
        prompts: rows that can be looked at token by token; on the first two each subcomponent is ablated (0: neither).
    """

    alpha: float = 3.0
    components: Path | None = None
    labels: Path | None = None
    graph_rows: int = 4
    prompts: int = 12


def dashboard_by_name(named: Named, out: Path, pages: Pages) -> Path:
    """Harvests, clusters, attributes, ablates and writes the pages into a new folder; the first page."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is not an empty folder: give the path of a new one.")
    labels = None if pages.labels is None else _labels(pages.labels)
    vpd, model, tokens = named.load()
    harvested = harvest(vpd, model, tokens, config=HarvestConfig(samples=16, bins=20, lags=2))
    prompts = tokens[: pages.prompts, :PROMPT_TOKENS] if pages.prompts else None
    config = DatasetGraphConfig(absolute=False)
    data = DashboardData(
        clustering=_clustering(vpd, model, tokens, pages),
        labels=labels,
        graph=dataset_graph(vpd, model, tokens[: pages.graph_rows], config=config) if pages.graph_rows else None,
        ablations=None if prompts is None else _ablations(vpd, model, prompts[:ABLATED_ROWS]),
        prompts=prompts,
    )
    title = f"Subcomponents of {Path(named.decomposition).name}"
    return dashboard(vpd, model, harvested, out, data=data, config=DashboardConfig(title=title))


def _clustering(vpd: Decomposition, model: Any, tokens: Tensor, pages: Pages) -> Clustering | None:
    if pages.components is not None:
        return Clustering.load(pages.components, vpd)
    return (
        cluster(vpd, model, tokens[:COMPONENT_ROWS], config=ClusterConfig(alpha=pages.alpha)) if pages.alpha else None
    )


def _ablations(vpd: Decomposition, model: Any, prompts: Tensor) -> pd.DataFrame:
    """By how much the prediction changes, in nats per token, without one subcomponent that is important on the prompts."""
    with torch.no_grad():
        metric = _divergence(model(prompts))
    return ablation_table(vpd, model, prompts, metric, config=AblationTableConfig(rows=16))


def _divergence(logits: Tensor) -> Callable[[Tensor], Tensor]:
    """The mean over tokens of KL(model ‖ ablated model)."""
    before = logits.log_softmax(-1)
    return lambda after: (before.exp() * (before - after.log_softmax(-1))).sum(-1).mean()


def _labels(path: Path) -> Labels | pd.DataFrame:
    if not path_of("labels", path).is_file():
        raise FileNotFoundError(f"{path} does not exist, or is not an ordinary file: give a file of labels.")
    if path.suffix == ".json":
        return Labels.load(path)
    try:
        return pd.read_csv(path)
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a CSV file: {' '.join(str(error).split())}.") from error
