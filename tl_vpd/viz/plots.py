"""Curves of a training run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from tl_vpd.checks import instance, text_of
from tl_vpd.viz.panel import Panel
from tl_vpd.viz.svg import svg
from tl_vpd.viz.text import escape, not_drawn

_PLOTS = {
    "reconstruction, KL to the target (nats per token)": (("stochastic", "adversarial"), True),
    "important subcomponents per token (L0)": (("l0",), False),
    "minimality losses, before their coefficients": (("importance", "frequency"), True),
    "faithfulness loss": (("faithfulness",), True),
}
"""Title of each plot -> its columns, and whether its axis is logarithmic."""

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
    picture = svg((10.4, 5.2), lambda figure: _draw(figure, history))
    body = f'<h3>{escape(title)}</h3>{missing_values}<div class="plot">{picture}</div>'
    return Panel(title=title, body=body, how_to_read=HOW)


def _draw(figure: Any, history: pd.DataFrame) -> None:
    for axes, (title, (columns, logarithmic)) in zip(figure.subplots(2, 2).flat, _PLOTS.items(), strict=True):
        for column, colour in zip(columns, ("#1f5fd0", "#e07b00"), strict=False):
            axes.plot(history["step"], history[column], color=colour, linewidth=1.3, label=column)
        axes.set_title(title, fontsize=9.5, loc="left")
        positive = not bool((history[list(columns)] <= 0).any(axis=None))
        axes.set_yscale("log" if logarithmic and positive else "linear")
        axes.set_xlabel("step")
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if len(columns) > 1:
            axes.legend(frameon=False, fontsize=8.5)
