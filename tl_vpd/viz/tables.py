"""A pandas table as a panel."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import pandas as pd

from tl_vpd.checks import text_of
from tl_vpd.viz.panel import Panel
from tl_vpd.viz.text import escape, number

SENTENCE = 40
"""Cells of more characters may be broken into lines."""


def table(df: pd.DataFrame, caption: str, *, note: str = "") -> Panel:
    """A DataFrame with a caption; numbers to three significant digits, an unnamed 0, 1, 2 … index left out.

    Raises:
        TypeError: ``df`` is not a DataFrame.
    """
    if not isinstance(df, pd.DataFrame):
        raise TypeError(f"viz.table shows a pandas DataFrame; got a {type(df).__name__}.")
    caption, note = text_of("caption", caption), text_of("note", note)
    plain = isinstance(df.index, pd.RangeIndex) and df.index.name is None
    shown = df if plain else df.reset_index()
    words = [not pd.api.types.is_numeric_dtype(kind) for kind in shown.dtypes]
    head = "".join(_cell("th", str(name), w) for name, w in zip(shown.columns, words, strict=True))
    rows = [
        "<tr>" + "".join(_cell("td", _text(v), w) for v, w in zip(row, words, strict=True)) + "</tr>"
        for row in shown.itertuples(index=False, name=None)
    ]
    body = (
        f"<h3>{escape(caption)}</h3>{f'<p class=note>{escape(note)}</p>' if note else ''}"
        f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'
    )
    return Panel(title=caption, body=body)


def _cell(tag: str, text: str, words: bool) -> str:
    kind = 'class="words sentence"' if words and len(text) > SENTENCE else "class=words"
    return f"<{tag}{f' {kind}' if words else ''}>{escape(text)}</{tag}>"


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, Real):
        return str(value)
    return f"{value:,}" if isinstance(value, Integral) else number(float(value))
