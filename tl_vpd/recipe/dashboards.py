"""``tl-vpd dashboard``: a decomposition, a model and tokens by name, and a folder of pages."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from tl_vpd.analysis import ClusterConfig, HarvestConfig, cluster, harvest
from tl_vpd.checks import path_of
from tl_vpd.recipe.data import DataRecipe
from tl_vpd.recipe.evaluating import decomposition_by_name
from tl_vpd.recipe.model import ModelRecipe, usable_device
from tl_vpd.viz import DashboardConfig, dashboard

COMPONENT_ROWS = 128
"""Rows that components are made from: their merging keeps all pairs of tokens and subcomponents in memory."""


def dashboard_by_name(
    decomposition: str,
    model: ModelRecipe,
    data: DataRecipe,
    out: Path,
    *,
    rows: int,
    alpha: float,
    labels: Path | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Harvests, clusters and writes the pages.

    Args:
        decomposition: a folder, or ``bundled``.
        model: its target.
        data: the tokens.
        out: does not exist, or is empty.
        rows: of tokens.
        alpha: of the components (0: there are none).
        labels: a CSV file with the columns ``subcomponent`` and ``label``, and any columns of numbers.
        trust_remote_code: as for ``ModelRecipe.load``.

    Returns:
        The first page.

    Raises:
        FileExistsError: there is something in the folder.
        FileNotFoundError: there is no file of labels.
        ValueError: as for ``viz.dashboard``.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is not an empty folder: give the path of a new one.")
    table = None if labels is None else _table(labels)
    vpd = decomposition_by_name(decomposition, device=usable_device(model.device))
    target = model.load(trust_remote_code=trust_remote_code)
    tokens = data.first(target, rows, default_key="validation")
    harvested = harvest(vpd, target, tokens, config=HarvestConfig(samples=16, bins=20, lags=2))
    clustering = None
    if alpha:
        clustering = cluster(vpd, target, tokens[:COMPONENT_ROWS], config=ClusterConfig(alpha=alpha))
    config = DashboardConfig(title=f"Subcomponents of {Path(decomposition).name}")
    return dashboard(vpd, target, harvested, out, clustering=clustering, labels=table, config=config)


def _table(path: Path) -> pd.DataFrame:
    if not path_of("labels", path).is_file():
        raise FileNotFoundError(f"{path} does not exist, or is not an ordinary file: give a CSV file of labels.")
    try:
        return pd.read_csv(path)
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a CSV file: {' '.join(str(error).split())}.") from error
