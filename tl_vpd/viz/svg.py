"""Figures of matplotlib as inline SVG (an interactive library would add megabytes)."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.figure import Figure


def svg(size: tuple[float, float], draw: Callable[[Any], None]) -> str:
    """An ``<svg>`` of a figure of ``size`` inches, filled by ``draw``.

    Text stays text, and ids depend on the content alone, so that the same numbers give the same page.
    """
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "tl_vpd",
        "font.family": "sans-serif",
        "font.size": 9,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
