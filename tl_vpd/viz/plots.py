"""Curves of a training run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from tl_vpd.checks import instance, text_of
from tl_vpd.viz.panel import Panel
from tl_vpd.viz.series import Series, legend, logarithmic, plots
from tl_vpd.viz.style import MODES, SERIES
from tl_vpd.viz.text import escape, not_drawn

_PLOTS = {
    "reconstruction, KL to the target (nats per token)": (("stochastic", "adversarial"), True),
    "important subcomponents per token (L0)": (("l0",), False),
    "minimality losses, before their coefficients": (("importance", "frequency"), True),
    "faithfulness loss": (("faithfulness",), True),
}
"""Title of each plot -> its columns, and whether its axis is logarithmic."""
_SHOWN = {
    "stochastic": Series(MODES["stochastic"]),
    "adversarial": Series(MODES["adversarial"], line="--"),
    "importance": Series(SERIES[0]),
    "frequency": Series(SERIES[4], line="--"),
}
"""How columns that share a plot are drawn."""

HOW = (
    "Reconstruction says how far the model's predictions move when unimportant subcomponents are masked at random "
    "(stochastic) or by an adversary (adversarial); L0 how many subcomponents are important per "
    "token; the faithfulness loss how far the subcomponents are from summing to the weights. The minimality losses "
    "follow a schedule in which their exponent falls, so their values at different steps are not comparable."
)


def losses(history: pd.DataFrame, *, title: str = "Training") -> Panel:
    """The course of a run's losses, from ``decompose(...).history`` or the table in ``metrics.jsonl``.

    Raises:
        TypeError: the history is not a table.
        ValueError: the history is empty or lacks columns.
        ImportError: matplotlib is not installed.
    """
    instance("history", history, pd.DataFrame)
    title = text_of("title", title)
    needed = {"step", *(name for columns, _ in _PLOTS.values() for name in columns)}
    missing = sorted(needed - set(history.columns))
    if missing:
        raise ValueError(f"The history lacks {', '.join(missing)}; pass run.history or pd.read_json(..., lines=True).")
    if not len(history):
        raise ValueError("The history has no steps.")
    missing_values = not_drawn(int((~np.isfinite(history[sorted(needed)].astype(float))).to_numpy().sum()))
    drawings = [
        partial(_draw, history=history, title=name, columns=columns, log=log) for name, (columns, log) in _PLOTS.items()
    ]
    body = f"<h3>{escape(title)}</h3>{missing_values}{legend(_SHOWN)}{plots(drawings)}"
    return Panel(title=title, body=body, how_to_read=HOW)


def _draw(axes: Any, history: pd.DataFrame, title: str, columns: Sequence[str], log: bool) -> None:
    for column in columns:
        axes.plot(history["step"], history[column], **_SHOWN.get(column, Series(SERIES[5])).options, label=column)
    axes.set_title(title, loc="left", fontsize=9.5)
    axes.set_xlabel("step")
    if log and not bool((history[list(columns)] <= 0).any(axis=None)):
        logarithmic(axes, "y")
