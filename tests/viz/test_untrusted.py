"""Any text and any number in a picture is shown, or said where it cannot be; in a browser: ``tests/campaigns/injection.py``."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from dataclasses import replace

import pandas as pd
import pytest
import torch

from tests.viz.test_plots import HISTORY
from tests.viz.test_subcomponents import a_window
from tl_vpd import viz
from tl_vpd.analysis.attention import AttentionByOffset, HeadNorms
from tl_vpd.viz.circuits import note_of, scale_of, underline, window_data
from tl_vpd.viz.panel import Panel
from tl_vpd.viz.svg import svg
from tl_vpd.viz.text import LONGEST, escape, label, visible


def hashes(policy: str, directive: str) -> list[str]:
    return re.findall(r"'sha256-([^']+)'", re.search(rf"{directive} ([^;]*)", policy)[1])


def sha256(code: str) -> str:
    return base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()


def test_a_pages_policy_allows_its_scripts_and_style_and_nothing_else(tmp_path):
    one = Panel("a", "<p>a</p>", libraries=("var one;",), scripts=("two()", "'é'"))
    panels = [one, Panel("b", "<p>b</p>", libraries=("var one;",))]
    page = viz.page(panels, "t", tmp_path / "page.html").read_text("utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert "unsafe" not in policy and policy.startswith("default-src 'none';")
    scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
    assert scripts == ["var one;", "two()", "'é'"] and hashes(policy, "script-src") == [
        sha256(code) for code in scripts
    ]
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.S)
    assert hashes(policy, "style-src") == [sha256(style)]
    assert "script-src 'none'" in viz.page(
        [viz.table(pd.DataFrame({"a": [1]}), "t")], "t", tmp_path / "page.html"
    ).read_text("utf-8")


def test_no_picture_has_style_attributes_which_the_policy_would_refuse():
    panels = [viz.losses(HISTORY), viz.head_norms(HeadNorms(0, {"s": torch.rand(3, 2)}))]
    assert not any(re.search(r"<[^>]*\sstyle=", panel.body) for panel in panels)


@pytest.mark.parametrize("body", ["<script>x()</script>", "<p>a</p><STYLE>p {}</STYLE>"])
def test_a_body_with_scripts_or_style_sheets_is_refused(body):
    with pytest.raises(ValueError, match=r"pass code as scripts=, and no style sheets\.$"):
        Panel("t", body)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\u202eabc\u2066", "\\u202eabc\\u2066"),
        ("\x00\x1b", "\\x00\\x1b"),
        ("\ud800x", "\\ud800x"),
        ("a\nb\tc\u00a0d", "a\nb\tc\u00a0d"),
        ("漢字🙂é", "漢字🙂é"),
        ("<&>\"'", "&lt;&amp;&gt;&quot;&#x27;"),
    ],
)
def test_html_shows_what_cannot_be_seen(text, shown):
    assert escape(text) == shown
    escape(text).encode("utf-8")


def test_labels_are_one_line_of_bounded_length():
    assert label("a\r\nb\nc\rd\te") == "a⏎b⏎c␍d⇥e"
    assert label("x" * 10_000) == "x" * LONGEST + "…\u00a0(10,000\u00a0characters)"
    assert visible(" " * 10_000).startswith("·×120…")


def test_plots_show_dollars_and_any_text():
    titles = ["$\\frac{$", "$x^2$", "a\x00\ud800\u202e", "漢字", "</text><b>", "x" * 10_000]

    def draw(figure):
        for axes, title in zip(figure.subplots(2, 3).flat, titles, strict=True):
            axes.set_title(title)

    picture = svg((9.0, 6.0), draw)
    for text in ("$\\frac{$", "$x^2$", "a\\x00\\ud800\\u202e", "漢字", "&lt;/text&gt;&lt;b&gt;", "(10,000"):
        assert text in picture, text
    assert "style=" not in picture and "<style" not in picture and 'font-size="' in picture


def test_numbers_that_are_not_finite_are_not_drawn_and_said():
    window = replace(
        a_window(), importances=torch.tensor([0.5, math.nan, 1.0]), activations=torch.tensor([1.0, -2.0, math.inf])
    )
    assert scale_of([window]) == 2.0 and "2 numbers are NaN or infinite" in note_of([window])
    assert window_data(window, 2.0)["values"] == [0.5, 0.0, 1.0] and underline(math.nan, 2.0) == ""
    broken = viz.losses(HISTORY.assign(l0=[30.0, math.nan, math.inf], stochastic=[math.nan, 1.0, 0.5]))
    assert "3 numbers are NaN or infinite and not drawn" in broken.body
    assert "not drawn" not in viz.losses(HISTORY).body
    offsets = AttentionByOffset(0, (), torch.tensor([[0.5, math.nan]]), None)
    assert "1 number is NaN or infinite" in viz.attention_by_offset(offsets).body
    norms = viz.head_norms(HeadNorms(0, {"s": torch.tensor([[1.0, math.nan], [0.5, 0.2]])}))
    assert '<td class="shade-25">0.5</td>' in norms.body or '<td class="shade-50">' in norms.body
