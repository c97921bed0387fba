"""``tl-vpd dashboard``: a decomposition, a model and tokens by name, and a folder of pages."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from tl_vpd.analysis import ClusterConfig, HarvestConfig, cluster, harvest
from tl_vpd.checks import path_of
from tl_vpd.recipe.named import Named
from tl_vpd.viz import DashboardConfig, dashboard

COMPONENT_ROWS = 128
"""Rows that components are made from: their merging keeps all pairs of tokens and subcomponents in memory."""


def dashboard_by_name(named: Named, out: Path, *, alpha: float, labels: Path | None = None) -> Path:
    """Harvests, clusters (``alpha`` 0: not) and writes the pages into a new folder; the first page.

    ``labels`` is a CSV file with the columns ``subcomponent`` and ``label``, and any columns of numbers.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is not an empty folder: give the path of a new one.")
    table = None if labels is None else _table(labels)
    vpd, model, tokens = named.load()
    harvested = harvest(vpd, model, tokens, config=HarvestConfig(samples=16, bins=20, lags=2))
    clustering = None
    if alpha:
        clustering = cluster(vpd, model, tokens[:COMPONENT_ROWS], config=ClusterConfig(alpha=alpha))
    config = DashboardConfig(title=f"Subcomponents of {Path(named.decomposition).name}")
    return dashboard(vpd, model, harvested, out, clustering=clustering, labels=table, config=config)


def _table(path: Path) -> pd.DataFrame:
    if not path_of("labels", path).is_file():
        raise FileNotFoundError(f"{path} does not exist, or is not an ordinary file: give a CSV file of labels.")
    try:
        return pd.read_csv(path)
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a CSV file: {' '.join(str(error).split())}.") from error
