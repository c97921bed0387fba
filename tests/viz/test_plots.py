"""The course of a run."""

from __future__ import annotations

import re

import pandas as pd
import pytest

from tl_vpd import viz
from tl_vpd.viz.series import DASHES, MARKS, SIZE, Series, legend, logarithmic, plot, series
from tl_vpd.viz.style import AMBER, MODES, PAGE, PANEL, SERIES, SHADES

HISTORY = pd.DataFrame(
    {
        "step": [0, 10, 20],
        "total": [9.0, 8.0, 7.0],
        "faithfulness": [1e-3, 1e-4, 1e-5],
        "stochastic": [2.0, 1.0, 0.5],
        "adversarial": [4.0, 3.0, 2.0],
        "importance": [100.0, 90.0, 80.0],
        "frequency": [900.0, 800.0, 700.0],
        "l0": [30.0, 20.0, 10.0],
    }
)


def heights(svg: str, colour: str) -> list[list[float]]:
    """The y of each point of every curve of a colour (in SVG, y grows downwards)."""
    curves = re.findall(rf'<path d="([^"]*)" clip-path="[^"]*" fill="none"[^>]* stroke="{colour}"', svg)
    return [[float(y) for y in re.findall(r"[ML] \S+ (\S+)", d)] for d in curves]


def test_six_curves_that_fall_evenly_where_the_numbers_do():
    panel = viz.losses(HISTORY, title="Run <1>")
    assert "<h3>Run &lt;1&gt;</h3>" in panel.body
    assert not panel.libraries
    named = [heights(panel.body, MODES[mode]) for mode in ("stochastic", "adversarial")]
    assert [len(curves) for curves in named] == [1, 1]
    minimality = [heights(panel.body, SERIES[i]) for i in (0, 4)]
    assert [len(curves) for curves in minimality] == [1, 1]
    plain = heights(panel.body, SERIES[5])
    assert len(plain) == 2
    assert all(a < b < c for curves in [*named, *minimality, plain] for a, b, c in curves)
    (a, b, c), (d, e, f) = plain
    assert b - a == pytest.approx(c - b, abs=1e-3)  # L0 is linear
    assert e - d == pytest.approx(f - e, abs=1e-3)  # faithfulness is logarithmic
    assert "<script" not in panel.html
    assert "<!DOCTYPE" not in panel.body


def test_the_same_history_gives_the_same_picture():
    assert viz.losses(HISTORY).html == viz.losses(HISTORY.copy()).html


def test_zeros_are_drawn_on_a_linear_axis():
    curve = heights(viz.losses(HISTORY.assign(faithfulness=[2.0, 1.0, 0.0])).body, SERIES[5])[1]
    assert curve[1] - curve[0] == pytest.approx(curve[2] - curve[1], abs=1e-3)


def test_what_is_wrong_is_said():
    with pytest.raises(ValueError, match="lacks l0, stochastic"):
        viz.losses(HISTORY.drop(columns=["l0", "stochastic"]))
    with pytest.raises(ValueError, match="no steps"):
        viz.losses(HISTORY.iloc[:0])


def texts(svg: str) -> list[str]:
    return [text.replace("−", "-") for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]


def test_a_logarithmic_axis_has_plain_numbers():
    body = viz.losses(HISTORY).body
    assert "$" not in body and "mathdefault" not in body
    assert {"0.001", "0.0001", "1e-05"} <= set(texts(body))

    def draw(axes, low, high):
        axes.plot([1, 2], [low, high])
        logarithmic(axes, "y")

    for low, high, expected in ((1e-7, 1e-1, "1e-05"), (3.0, 90.0, "20"), (0.28, 0.34, "0.3")):
        shown = texts(plot(lambda axes, low=low, high=high: draw(axes, low, high)))
        assert sum(low / 2 <= float(text) <= 2 * high for text in shown if re.fullmatch(r"[\d.e-]+", text)) >= 2
        assert expected in shown


def test_kinds_differ_without_colours_and_the_legend_has_their_names():
    shown = series([f"<method {i}>" for i in range(12)])
    assert len({(one.colour, one.marker) for one in shown.values()}) == 12
    assert all(a.marker != b.marker for a, b in zip(shown.values(), list(shown.values())[1:], strict=False))
    html = legend({**shown, "dashed": Series(SERIES[1], "", "--"), "points": Series(SERIES[0], "X", "")})
    assert html.count("<span>") == 14 and "&lt;method 3&gt;" in html and "<method" not in html
    assert html.count("stroke-dasharray") == 1 and html.count('fill="') == 13 and html.count('stroke="') == 13
    assert all(one.marker in MARKS and one.line in DASHES for one in shown.values())


def test_plots_are_narrow_enough_for_a_phone():
    """At the 354 pixels that a panel has on a screen of 400, nine-point text is 10 pixels high."""
    body = viz.losses(HISTORY).body
    widths = [float(width) for width in re.findall(r'<svg [^>]*width="([\d.]+)pt"', body)]
    assert widths == pytest.approx([72 * SIZE[0]] * 4) and 9 * 354 / widths[0] > 10
    assert body.count('<div class="plots">') == 1


def contrast(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    def luminance(colour):
        parts = [c / 255 for c in colour]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def rgb(text: str) -> tuple[int, ...]:
    digits = text.lstrip("#")
    digits = "".join(2 * c for c in digits) if len(digits) == 3 else digits
    return tuple(int(digits[i : i + 2], 16) for i in (0, 2, 4))


def over(colour: tuple[int, ...], share: float, ground: tuple[int, ...]) -> tuple[float, ...]:
    return tuple(share * c + (1 - share) * g for c, g in zip(colour, ground, strict=True))


def test_text_and_lines_stand_out_on_white_and_on_dark():
    assert all(contrast(rgb(colour), (255, 255, 255)) >= 3 for colour in SERIES)
    variables = [
        dict(re.findall(r"--(\w+): (#\w+)", text)) for text in (PANEL, PAGE.partition("color-scheme: dark")[2])
    ]
    for colours in variables:
        for ink in ("ink", "soft", "positive", "negative", "passed"):
            assert contrast(rgb(colours[ink]), rgb(colours["card"])) >= 4.5
        assert contrast(rgb(colours["soft"]), rgb(colours["chip"])) >= 4.5
    light, dark = (rgb(colours["card"]) for colours in variables)
    rules = re.findall(r"td\.shade-(\d+) \{ background: rgba\(([\d, ]+), ([\d.]+)\); color: (\S+); \}", PANEL)
    assert len(rules) == SHADES + 1
    for _, colour, share, ink in rules:
        blue = tuple(int(c) for c in colour.split(","))
        ink = variables[0]["ink"] if ink == "inherit" else ink
        assert contrast(rgb(ink), over(blue, float(share), light)) >= 4.5
        assert contrast((255, 255, 255), over(blue, float(share), dark)) >= 4.5
    amber = tuple(int(c) for c in AMBER.split(","))
    for percent in range(101):  # tokens: black above 0.5, else the ink of the panel, or white on dark
        share = percent / 100
        assert contrast((0, 0, 0) if share > 0.5 else rgb(variables[0]["ink"]), over(amber, share, light)) >= 4.5
        assert contrast((0, 0, 0) if share > 0.5 else (255, 255, 255), over(amber, share, dark)) >= 4.5
