"""``tl-vpd compact``: the smaller decomposition, in a new folder."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from tl_vpd.files.atomic import new_folder
from tl_vpd.hooks.compact import COMPACT
from tl_vpd.recipe.named import Named


def compact_by_name(named: Named, out: Path, *, threshold: float) -> pd.DataFrame:
    """Writes a decomposition without what is never important on the tokens: the counts ``before`` and ``after`` by site."""
    with new_folder(out) as written:
        vpd, model, tokens = named.load(default_key="training")
        small = vpd.compact(model, tokens, threshold=threshold)
        small.save(written)
    entry = small.record[COMPACT][-1]
    return pd.DataFrame({name: entry[name] for name in ("before", "after")})
