"""Pages: self-contained, one copy of circuitsvis's script, each explanation once."""

from __future__ import annotations

from html.parser import HTMLParser

import pandas as pd
import pytest

from tests.tiny import some_tokens
from tl_vpd import viz
from tl_vpd.analysis import HarvestConfig, harvest
from tl_vpd.viz.circuits import library
from tl_vpd.viz.panel import Panel

LIBRARY = "var CircuitsVis="


class _Addresses(HTMLParser):
    """Everything a browser would fetch or follow."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attributes):
        names = ("src", "href", "srcset", "data", "action")
        self.found += [value for name, value in attributes if name in names and value is not None]


def addresses(html: str) -> list[str]:
    parser = _Addresses()
    parser.feed(html)
    return parser.found


@pytest.fixture
def panels(model, vpd) -> list[Panel]:
    result = harvest(vpd, model, some_tokens(shape=(6, 7)), config=HarvestConfig(windows=2))
    firing = [str(a) for a in vpd.site_axis.subcomponents() if result[a].windows]
    history = pd.DataFrame(
        {"step": [0, 10], **{name: [2.0, 1.0] for name in ("stochastic", "adversarial", "importance", "frequency")}}
    ).assign(l0=[5.0, 4.0], faithfulness=[1e-3, 1e-4])
    parts = [viz.subcomponent(result, name) for name in firing[:3]]
    return [viz.losses(history), viz.table(result.top(3), "Largest"), *parts]


def test_a_page_holds_one_script_each_panel_and_each_explanation_once(panels, tmp_path):
    path = viz.page(panels, "A <page>", tmp_path / "page.html", introduction="First & last.\n\nSecond.")
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    assert "<title>A &lt;page&gt;</title>" in text
    assert "<p>First &amp; last.</p><p>Second.</p>" in text
    assert text.count(LIBRARY) == 1
    assert text.count("window.tlVpdDraw =") == 1
    assert all(text.count(panel.body) == 1 for panel in panels)
    assert text.count("A subcomponent is one rank-one piece") == 1
    assert text.count("Reconstruction says") == 1
    assert text.index(LIBRARY) < text.index("tlVpdDraw({")
    assert all(text.count(code) == 1 for panel in panels for code in panel.scripts)
    assert [a for a in addresses(text) if not a.startswith("#")] == []
    assert text.count('href="#panel-') == len(panels)


def test_a_page_without_windows_is_small(panels, tmp_path):
    path = viz.page(panels[:2], "Small", tmp_path / "page.html")
    assert LIBRARY not in path.read_text(encoding="utf-8")
    assert path.stat().st_size < 150_000


def test_a_panel_alone_brings_its_script_and_never_the_network(panels, tmp_path):
    for panel in panels:
        assert panel._repr_html_() == panel.html
        assert panel.html.count(LIBRARY) == len(panel.libraries)
        assert [a for a in addresses(panel.html) if not a.startswith("#")] == []
    path = panels[-1].save(tmp_path / "one.html")
    assert path.read_text(encoding="utf-8").count(LIBRARY) == 1


def test_the_library_ends_no_script_and_names_no_source_map():
    assert "</script" not in library()
    assert "sourceMappingURL" not in library()


def test_what_is_wrong_is_said(panels, tmp_path):
    with pytest.raises(ValueError, match="at least one panel"):
        viz.page([], "Empty", tmp_path / "page.html")
    with pytest.raises(OSError):
        viz.page(panels, "Nowhere", tmp_path / "no" / "page.html")
