"""Small line plots over offsets, one for each head or pair."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from jaxtyping import Int
from torch import Tensor

from tl_vpd.viz.series import Series, legend, plots
from tl_vpd.viz.text import not_drawn


def lines(
    panels: Sequence[tuple[str, Mapping[str, Tensor]]],
    x: Int[Tensor, " x"],
    x_label: str,
    y_label: str,
    shown: Mapping[str, Series],
    *,
    share_y: bool = False,
) -> str:
    """A legend and plots (title, line by name) over the same x, after a note where numbers are not finite.

    Raises:
        ValueError: there is nothing to draw.
        ImportError: matplotlib is not installed.
    """
    if not panels:
        raise ValueError("There is nothing to draw.")
    values = [y for _, by_name in panels for y in by_name.values()]
    finite = [y[y.isfinite()] for y in values]
    ends = None
    if share_y and (finite := [y for y in finite if len(y)]):
        low, high = min(float(y.min()) for y in finite), max(float(y.max()) for y in finite)
        room = 0.05 * (high - low) or 0.05
        ends = min(low, 0.0) - room, max(high, 0.0) + room

    def draw(axes: Any, title: str, by_name: Mapping[str, Tensor]) -> None:
        axes.axhline(0, color="#c9ced6", linewidth=0.7, zorder=0)
        for name, y in by_name.items():
            axes.plot(x.tolist(), y.tolist(), **shown[name].options, label=name)
        axes.set_title(title, loc="left", fontsize=9.5)
        axes.set(xlabel=x_label, ylabel=y_label, ylim=ends)

    missing = sum(int((~y.isfinite()).sum()) for y in values)
    drawings = [partial(draw, title=title, by_name=by_name) for title, by_name in panels]
    return not_drawn(missing) + legend(shown) + _short(plots(drawings))


def _short(svg: str) -> str:
    """The same picture in half the bytes: coordinates to a hundredth of a point, no indentation."""
    return re.sub(r"\s*\n\s*", "\n", re.sub(r"\d+\.\d{3,}", lambda match: f"{float(match[0]):.2f}", svg))
