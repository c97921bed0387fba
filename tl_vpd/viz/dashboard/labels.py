"""Labels and scores that a dashboard is given: texts by address, or a table with any numbers beside them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from numbers import Real
from typing import Any

import pandas as pd

from tl_vpd.checks import shown, text_of
from tl_vpd.site import Subcomponent, nearest
from tl_vpd.viz.text import label

Scores = dict[str, dict[str, float | None]]


def labels_and_scores(
    labels: Mapping[str, Any] | pd.DataFrame | None, known: Mapping[str, Any]
) -> tuple[dict[str, str], Scores]:
    """Texts by address, and numbers by name and address; a column without any number is left out.

    Args:
        labels: texts by address, or a table with the column ``subcomponent``, perhaps ``label``, and any columns of numbers; what
            has ``to_pandas`` is such a table.
        known: what was harvested or clustered, by address.

    Raises:
        KeyError: a subcomponent was not harvested.
        TypeError: labels are neither, or one is not a string.
        ValueError: the table has no column ``subcomponent``, or one twice.
    """
    if labels is None:
        return {}, {}
    if not isinstance(labels, pd.DataFrame) and hasattr(labels, "to_pandas"):
        labels = labels.to_pandas()
    if isinstance(labels, pd.DataFrame):
        if "subcomponent" not in labels:
            raise ValueError(f"labels has the columns {', '.join(map(str, labels))}: 'subcomponent' is needed.")
        addresses = [str(Subcomponent.parse(address)) for address in labels["subcomponent"]]
        texts = list(labels["label"]) if "label" in labels else []
        columns = {
            str(name): labels[name].tolist()
            for name in labels
            if name != "subcomponent" and pd.api.types.is_numeric_dtype(labels[name])
        }
    elif isinstance(labels, Mapping):
        addresses, texts, columns = [str(Subcomponent.parse(a)) for a in labels], list(labels.values()), {}
    else:
        raise TypeError(f"labels={shown(labels)} is a {type(labels).__name__}: give texts by address, or a table.")
    if len(set(addresses)) < len(addresses):
        raise ValueError(f"labels has {Counter(addresses).most_common(1)[0][0]} twice: give each subcomponent once.")
    if missing := next((a for a in addresses if a not in known), None):
        raise KeyError(f"labels has {missing}, which was not harvested{nearest(missing, known)}.")
    named = {
        a: label(text_of(f"labels[{a!r}]", t)) for a, t in zip(addresses, texts, strict=False) if not _is_missing(t)
    }
    scores = {name: dict(zip(addresses, map(_number, values), strict=True)) for name, values in columns.items()}
    return named, {name: by for name, by in scores.items() if any(x is not None for x in by.values())}


def _is_missing(text: Any) -> bool:
    """Whether a table has no label there."""
    return text is None or text != text


def _number(value: Any) -> float | None:
    """A number for JSON (None: it is not a finite one)."""
    if isinstance(value, bool):
        return float(value)
    return float(f"{value:.4g}") if isinstance(value, Real) and math.isfinite(value) else None
