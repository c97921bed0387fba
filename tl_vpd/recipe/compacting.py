"""``tl-vpd compact``: a decomposition, a model and tokens by name, and the smaller decomposition in a new folder."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from tl_vpd.files.atomic import new_folder
from tl_vpd.hooks.compact import COMPACT
from tl_vpd.recipe.data import DataRecipe
from tl_vpd.recipe.evaluating import decomposition_by_name
from tl_vpd.recipe.model import ModelRecipe, usable_device


def compact_by_name(
    decomposition: str,
    model: ModelRecipe,
    data: DataRecipe,
    out: Path,
    *,
    rows: int,
    threshold: float,
    trust_remote_code: bool = False,
) -> pd.DataFrame:
    """Writes a decomposition without what is never important on the first rows of data.

    Args:
        decomposition: a folder, or ``bundled``.
        model: its target.
        data: the tokens.
        out: does not exist, or is empty.
        rows: of tokens.
        threshold: as in ``tl_vpd.hooks.compact``.
        trust_remote_code: as for ``ModelRecipe.load``.

    Returns:
        The counts ``before`` and ``after``, one row per site.

    Raises:
        FileExistsError: there is something in the folder.
    """
    with new_folder(out) as written:
        vpd = decomposition_by_name(decomposition, device=usable_device(model.device))
        target = model.load(trust_remote_code=trust_remote_code)
        small = vpd.compact(target, data.first(target, rows), threshold=threshold)
        small.save(written)
    entry = small.record[COMPACT][-1]
    return pd.DataFrame({name: entry[name] for name in ("before", "after")})
