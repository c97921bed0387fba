"""How kinds of things are drawn: a colour, a marker and a dash each, the same in all plots of a panel, with a legend in HTML.

A legend that is text keeps its size at every width and covers no data; markers and dashes tell kinds apart without colours. Plots
are pictures of one size, beside each other where there is room, so that their texts stay legible on a phone.

>>> shown = series(["vpd", "plt"])                       # doctest: +SKIP
>>> legend(shown) + plots([partial(draw, shown)])        # doctest: +SKIP
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from tl_vpd.viz.style import SERIES
from tl_vpd.viz.svg import svg
from tl_vpd.viz.text import escape, label

MARKS = {
    "": "",
    ".": "M13 3.4a1.6 1.6 0 1 0 .01 0z",
    "o": "M13 1.6a3.4 3.4 0 1 0 .01 0z",
    "s": "M10 2h6v6h-6z",
    "^": "M13 1.2l4 7.2h-8z",
    "D": "M13 .8l4.2 4.2l-4.2 4.2l-4.2-4.2z",
    "v": "M13 8.8l4-7.2h-8z",
    "P": "M11.6 1h2.8v2.6h2.6v2.8h-2.6v2.6h-2.8v-2.6h-2.6v-2.8h2.6z",
    "X": "M9.2 2.8l1.8-1.8l2 2l2-2l1.8 1.8l-2.2 2.2l2.2 2.2l-1.8 1.8l-2-2l-2 2l-1.8-1.8l2.2-2.2z",
}
"""Matplotlib's markers as paths in the middle of a legend's line of 26 x 10."""
DASHES = {"": None, "-": "", "--": "5 3", ":": "1.5 2.5"}
"""Matplotlib's line styles as dash arrays (None: no line)."""
SIZE = (4.2, 2.6)
"""Inches of a plot: wide enough for two beside each other on a page, and legible at the width of a phone."""


@dataclass(frozen=True)
class Series:
    """How one kind of thing is drawn.

    Attributes:
        colour: of ``style.SERIES``.
        marker: one of ``MARKS``.
        line: one of ``DASHES``.
    """

    colour: str
    marker: str = ""
    line: str = "-"

    @property
    def options(self) -> dict[str, Any]:
        """What matplotlib's ``plot`` and ``errorbar`` get."""
        shown = {"marker": self.marker or None, "linestyle": self.line or "none"}
        return {"color": self.colour, "markersize": 4, "linewidth": 1.3, **shown}


def series(names: Iterable[str], *, line: str = "-", marked: bool = True) -> dict[str, Series]:
    """Each name with a colour and marker; where there are more names than colours, markers differ."""
    marks = [m for m in MARKS if m not in ("", ".")] if marked else [""]
    return {
        name: Series(SERIES[i % len(SERIES)], marks[i % len(marks)], line)
        for i, name in enumerate(dict.fromkeys(names))
    }


def legend(shown: Mapping[str, Series]) -> str:
    """A row of HTML with a line of each series and its name."""
    items = "".join(f"<span>{_swatch(one)}{escape(label(name))}</span>" for name, one in shown.items())
    return f'<div class="legend">{items}</div>'


def _swatch(one: Series) -> str:
    dash = DASHES[one.line]
    array = f' stroke-dasharray="{dash}"' if dash else ""
    line = "" if dash is None else f'<path d="M1 5H25" stroke="{one.colour}" stroke-width="1.6"{array}/>'
    mark = f'<path d="{MARKS[one.marker]}" fill="{one.colour}"/>' if one.marker else ""
    return f'<svg width="26" height="10" viewBox="0 0 26 10" aria-hidden="true">{line}{mark}</svg>'


def plots(drawings: Sequence[Callable[[Any], None]], size: tuple[float, float] = SIZE) -> str:
    """Plots of one size, each filled by a function of its axes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    return grid([plot(draw, size) for draw in drawings])


def plot(draw: Callable[[Any], None], size: tuple[float, float] = SIZE) -> str:
    """One plot as ``<svg>``."""

    def on(figure: Any) -> None:
        axes = figure.subplots()
        draw(axes)
        axes.set_axisbelow(True)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)

    return svg(size, on)


def grid(pictures: Sequence[str]) -> str:
    """Pictures beside each other, as many as there is room for."""
    return f'<div class="plots">{"".join(f"<div class=plot>{picture}</div>" for picture in pictures)}</div>'


def logarithmic(axes: Any, which: str) -> None:
    """Makes the axis ``x`` or ``y`` logarithmic, with plain numbers (formulas are not drawn); after the data are there."""
    axis = getattr(axes, f"{which}axis")
    getattr(axes, f"set_{which}scale")("log")
    low, high = sorted(getattr(axes, f"get_{which}lim")())
    steps = (1, 2, 5) if math.log10(high / low) < 2.5 else (1,)
    locator: LogLocator | MaxNLocator = LogLocator(subs=steps)
    if sum(low <= tick <= high for tick in locator.tick_values(low, high)) < 2:
        locator = MaxNLocator(4)
    axis.set_major_locator(locator)
    axis.set_major_formatter("{x:,g}" if high < 1e6 else "{x:g}")
    axis.set_minor_formatter(NullFormatter())
