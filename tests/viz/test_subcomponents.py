"""A subcomponent's panel: what it says, that nothing in a token gets out, and that a browser draws it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape

import pytest
import torch

from tests.tiny import some_tokens
from tl_vpd import viz
from tl_vpd.analysis import Harvest, HarvestConfig, Window, harvest
from tl_vpd.viz.circuits import draw, underline, window_data

SITE = "blocks.1.mlp.W_in"
EVIL = "</script><b>&\"'\n x"


@pytest.fixture
def found(model, vpd) -> Harvest:
    """A harvest in which every token's text is hostile."""
    record = harvest(vpd, model, some_tokens(shape=(6, 7)), config=HarvestConfig(windows=3, radius=2))
    return replace(record, names={i: f"{EVIL}{i}" for i in record.names})


def fullest(found: Harvest) -> str:
    return str(max(found.site_axis.subcomponents(), key=lambda a: len(found[a].windows)))


def a_window() -> Window:
    return Window(
        7, 11, 10, (1, 2, 3), ("<b>", " x", "\n"), torch.tensor([0.0, 1.0, 0.25]), torch.tensor([2.0, -4.0, 0.1])
    )


def test_underlines_by_hand():
    assert underline(2.0, 2.0) == "color-mix(in srgb, var(--positive) 100%, transparent)"
    assert underline(-1.0, 2.0) == "color-mix(in srgb, var(--negative) 50%, transparent)"
    assert underline(0.01, 2.0) == underline(0.0, 0.0) == ""


def test_what_a_window_is_drawn_from():
    data = window_data(a_window(), 4.0)
    assert data["tokens"] == ["&lt;b&gt;", "\u00a0x", "⏎"]
    assert data["values"] == [0.0, 1.0, 0.25]
    assert data["peak"] == 1
    assert data["underline"] == [underline(2.0, 4.0), underline(-4.0, 4.0), ""]
    assert data["about"][1] == "\u00a0x\nimportance 1\nactivation −4"


def test_the_place_of_a_window_holds_its_text_until_it_is_drawn():
    (place,), script = draw([a_window()], 4.0)
    key = re.search(r'data-tlvpd="(\w+)"', place)[1]
    assert place.endswith(">&lt;b&gt;<mark>\u00a0x</mark>⏎</div>")
    assert list(json.loads(re.fullmatch(r"tlVpdDraw\((.*)\)", script)[1])) == [key]


def test_the_panel_says_what_the_harvest_found(model, vpd):
    found = harvest(vpd, model, some_tokens(shape=(6, 7)), config=HarvestConfig(windows=3, radius=2))
    address = fullest(found)
    record, panel = found[address], viz.subcomponent(found, address, note="a <label>", tokens=2)
    assert panel.title == address
    assert panel.libraries and panel.scripts
    assert f"<b>{record.density:.2%} of tokens</b>" in panel.body
    assert f"<b>{record.firings:,} times</b>" in panel.body
    assert "<p>a &lt;label&gt;</p>" in panel.body
    assert [f"row {w.row}, token {w.pos}" in panel.body for w in record.windows] == [True] * 3
    cells = re.findall(r'<span class="tok">(.*?)</span></td><td>.*?</td><td>(\d+)</td>', panel.body)
    expected = [
        (token, str(count))
        for find in (record.input_tokens, record.output_tokens)
        for by in ("pmi", "recall")
        for token, count in find(2, by=by)[["token", "count"]].itertuples(index=False)
    ]
    assert cells == expected
    assert viz.subcomponent(found, address, windows=1).body.count('class="window"') == 1


def test_hostile_tokens_stay_text(found):
    panel = viz.subcomponent(found, fullest(found))
    assert "<b>&" not in panel.body
    assert "</script><b" not in panel.body
    assert panel.html.count("</script>") == len(panel.libraries + panel.scripts) == 2
    data = json.loads(re.fullmatch(r"tlVpdDraw\((.*)\)", panel.scripts[0])[1])
    token = next(iter(data.values()))["tokens"][0]
    assert "<" not in token
    assert unescape(token).startswith("</script><b>&\"'⏎\u00a0x")


def test_a_subcomponent_that_never_fires(found):
    none = replace(found.windows, rows=torch.full_like(found.windows.rows, -1))
    silent = replace(found, windows=none, firings=torch.zeros_like(found.firings))
    panel = viz.subcomponent(silent, f"{SITE}:0")
    assert "exceeds 0.1 at no token" in panel.body
    assert not panel.libraries
    assert "<script" not in panel.html


def test_what_is_wrong_is_said(found, vpd):
    with pytest.raises(KeyError, match="did you mean"):
        viz.subcomponent(found, "blocks.1.mlp.W_inn:0")
    with pytest.raises(IndexError):
        viz.subcomponent(found, f"{SITE}:6")
    with pytest.raises(TypeError, match="got a Decomposition"):
        getattr(viz.subcomponent, "__wrapped__", viz.subcomponent)(vpd, f"{SITE}:0")
    with pytest.raises(ValueError, match="windows=-1"):
        viz.subcomponent(found, f"{SITE}:0", windows=-1)


def test_a_browser_draws_windows_underlines_and_text(found, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("neither chromium nor google-chrome is installed to run the page's script")
    panel = viz.subcomponent(found, fullest(found))
    path = viz.page([panel, panel], "Twice the same", tmp_path / "page.html")  # both of them have to be drawn
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=10000", "--dump-dom", path.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    drawn = dom.partition("<body>")[2]
    windows = found[panel.title].windows
    spans = re.findall(r'<span[^>]* data-about="[^"]*"[^>]*>([^<]*)</span>', drawn)
    assert len(spans) == 2 * sum(len(w.tokens) for w in windows)
    shown = unescape(spans[0]).replace("\u00a0", " ")
    assert shown == windows[0].tokens[0].replace("\n", "⏎")
    assert len(re.findall(r'<span class="(?:strong )?peak"', drawn)) == 2 * len(windows)
    strong = sum(int((w.importances > 0.5).sum()) for w in windows)
    assert 0 < strong == len(re.findall(r'<span class="strong', drawn)) / 2
    assert len(re.findall(r'style="[^"]*background-color: rgba?\(255, 190, 70', drawn)) == len(spans)
    data = json.loads(re.fullmatch(r"tlVpdDraw\((.*)\)", panel.scripts[0])[1])
    underlined = sum(bool(colour) for window in data.values() for colour in window["underline"])
    assert 0 < underlined == len(re.findall(r'style="[^"]*box-shadow: inset 0(?:px)? -3px color-mix', drawn)) / 2
