"""Small line plots in a grid, made by matplotlib as inline SVG."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Int
from torch import Tensor

from tl_vpd.viz.svg import svg
from tl_vpd.viz.text import not_drawn

COLOURS = ("#1f5fd0", "#e07b00", "#168a5b", "#c2185b", "#7b4bc4", "#5c6775", "#0f8b9d", "#9a6b00")


def lines(
    plots: Sequence[tuple[str, Mapping[str, Tensor]]],
    x: Int[Tensor, " x"],
    x_label: str,
    y_label: str,
    *,
    dashed: Sequence[str] = (),
    share_y: bool = False,
) -> str:
    """An ``<svg>`` (after a note, where numbers are not finite) of plots (title, line by name) over the same x, two in each row.

    Raises:
        ValueError: there is nothing to draw.
        ImportError: matplotlib is not installed.
    """
    if not plots:
        raise ValueError("There is nothing to draw.")
    columns = min(2, len(plots))
    rows = -(-len(plots) // columns)

    def draw(figure: Any) -> None:
        every = figure.subplots(rows, columns, squeeze=False, sharey=share_y).flat
        for axes, (title, by_name) in zip(every, plots, strict=False):
            for colour, (name, y) in zip(COLOURS * len(by_name), by_name.items(), strict=False):
                style = "--" if name in dashed else "-"
                axes.plot(
                    x.tolist(), y.tolist(), style, color=colour, linewidth=1.3, marker=".", markersize=3, label=name
                )
            axes.axhline(0, color="#c9ced6", linewidth=0.7, zorder=0)
            axes.set_title(title, fontsize=9, loc="left")
            axes.grid(alpha=0.25, linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        shown = list(figure.axes)
        for axes in shown[len(plots) :]:
            axes.set_visible(False)
        for axes in shown[-columns:] if len(plots) == len(shown) else shown[len(plots) - columns : len(plots)]:
            axes.set_xlabel(x_label)
        for axes in shown[::columns]:
            axes.set_ylabel(y_label)
        shown[0].legend(frameon=False, fontsize=8, ncols=2)

    missing = sum(int((~y.isfinite()).sum()) for _, by_name in plots for y in by_name.values())
    return not_drawn(missing) + _short(svg((5.2 * columns, 2.3 * rows + 0.2), draw))


def _short(svg: str) -> str:
    """The same picture in half the bytes: coordinates to a hundredth of a point, no indentation."""
    return re.sub(r"\s*\n\s*", "\n", re.sub(r"\d+\.\d{3,}", lambda match: f"{float(match[0]):.2f}", svg))
