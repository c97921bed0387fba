"""The course of a run."""

from __future__ import annotations

import re

import pandas as pd
import pytest

from tl_vpd import viz

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
    curves = re.findall(rf'<path d="([^"]*)" clip-path="[^"]*" fill="none" stroke="{colour}"', svg)
    return [[float(y) for y in re.findall(r"[ML] \S+ (\S+)", d)] for d in curves]


def test_six_curves_that_fall_evenly_where_the_numbers_do():
    panel = viz.losses(HISTORY, title="Run <1>")
    assert "<h3>Run &lt;1&gt;</h3>" in panel.body
    assert not panel.libraries
    blue, orange = heights(panel.body, "#1f5fd0"), heights(panel.body, "#e07b00")
    assert len(blue) == 4
    assert len(orange) == 2
    assert all(a < b < c for a, b, c in blue + orange)
    (a, b, c), (d, e, f) = blue[1], blue[3]
    assert b - a == pytest.approx(c - b, abs=1e-3)  # L0 is linear
    assert e - d == pytest.approx(f - e, abs=1e-3)  # faithfulness is logarithmic
    assert "<script" not in panel.html
    assert "<!DOCTYPE" not in panel.body


def test_the_same_history_gives_the_same_picture():
    assert viz.losses(HISTORY).html == viz.losses(HISTORY.copy()).html


def test_zeros_are_drawn_on_a_linear_axis():
    curve = heights(viz.losses(HISTORY.assign(faithfulness=[2.0, 1.0, 0.0])).body, "#1f5fd0")[3]
    assert curve[1] - curve[0] == pytest.approx(curve[2] - curve[1], abs=1e-3)


def test_what_is_wrong_is_said():
    with pytest.raises(ValueError, match="lacks l0, stochastic"):
        viz.losses(HISTORY.drop(columns=["l0", "stochastic"]))
    with pytest.raises(ValueError, match="no steps"):
        viz.losses(HISTORY.iloc[:0])
