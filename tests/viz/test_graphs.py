"""The interactive graph: self-contained, escaped, holding what it says it shows; in Chromium where it is installed."""

from __future__ import annotations

import dataclasses
import json
import re
import struct
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch

from tests.analysis.test_graph_result import by_hand
from tests.campaigns.browser import Browser, chromium
from tests.viz.test_panel import addresses
from tl_vpd.analysis import HarvestConfig, Label, Labels, harvest
from tl_vpd.analysis.graph import AttributionGraph, LogitTarget, attribution_graph
from tl_vpd.viz.graphs import graph as picture


def data_of(panel):
    return json.loads(re.fullmatch(r"tlVpdGraph\(\"tlvpd-graph-\w+\", (\{.*\})\)", panel.scripts[0])[1])


def test_nodes_edges_and_hover_texts():
    graph = by_hand()
    data = data_of(picture(graph))
    assert data["label"] == list(graph.labels)
    assert [e[2] for e in data["edges"]] == [-3, 2, -2, 1.5, 1, 1, -1, 0.5]
    assert data["y"][5] == 4 and data["x"][5] == 1 and data["y"][0] == 0
    assert data["name"][5] == graph.logits[0].text and any(name.startswith("0 W_in:") for name in data["name"])
    assert (
        data["columns"] == ["a", "</b>"] and data["rows"][1] == "0\u00a0W_O" and len(data["rows"]) == len(graph.names)
    )
    assert data["into"][2] == [[1, -3], [0, 1]] and data["from"][2] == [[3, -2], [4, 0.5]]
    assert "activation 0.5, importance 0.25" in data["about"][2]
    assert data["radius"][5] == max(data["radius"]) and data["importance"] == [None, None, 0.25, 1, 0.5, None]
    assert data_of(picture(dataclasses.replace(graph, words=("  ", "</b>"))))["columns"] == ["··", "</b>"]


def test_text_from_tokens_is_escaped_and_the_page_needs_no_network(tmp_path):
    graph = by_hand()
    evil = LogitTarget(3, 1, None, "</script><img src=x>", 0.5)
    panel = picture(dataclasses.replace(graph, logits=(evil,)))
    path = panel.save(tmp_path / "graph.html")
    text = path.read_text(encoding="utf-8")
    assert "</script><img" not in text and not addresses(text) and len(text) < 60_000
    assert panel.html == picture(dataclasses.replace(graph, logits=(evil,))).html


def test_a_models_graph_with_tokens_of_its_subcomponents(model, vpd, tokens):
    graph = attribution_graph(vpd, model, tokens[:1], 3)
    result = harvest(vpd, model, tokens, config=HarvestConfig(windows=1))
    panel = picture(graph, nodes=12, edges=30, harvest=result, title="Mine")
    data = data_of(panel)
    assert len(data["edges"]) == 30 and sum("blocks" in label for label in data["label"]) == 12
    assert any(line.startswith("fires at") for about in data["about"] for line in about) and "12 of" in panel.body
    assert sorted((abs(e[2]) for e in data["edges"]), reverse=True) == [abs(e[2]) for e in data["edges"]]
    address = next(label for label in data["label"] if "blocks" in label).partition("@")[0]
    labels = Labels({address: Label("digits <b>of</b> a year", "by hand")})
    labelled = data_of(picture(graph, nodes=12, edges=30, labels=labels))
    texts = dict(zip(labelled["label"], labelled["about"], strict=True))
    assert all(
        (about[1] == "digits <b>of</b> a year") == node.startswith(f"{address}@") for node, about in texts.items()
    )


def test_mistakes_are_said():
    with pytest.raises(ValueError, match="nodes=0"):
        picture(by_hand(), nodes=0)


def large() -> AttributionGraph:
    """2,000 subcomponents in 30 layers with seven sites each, over 24 tokens."""
    generator = torch.Generator().manual_seed(0)
    layers, tokens, nodes, edges = 30, 24, 2000, 60_000
    sites = [f"blocks.{i}.{s}" for i in range(layers) for s in ("attn.W_Q", "attn.W_K", "attn.W_V", "attn.W_O")]
    sites = [*sites, *(f"blocks.{i}.mlp.{s}" for i in range(layers) for s in ("W_gate", "W_in", "W_out"))]
    names = ("embed", *sorted(sites, key=lambda site: int(site.split(".")[1])), "logits")

    def randint(low: int, high: int, n: int) -> torch.Tensor:
        return torch.randint(low, high, (n,), generator=generator)

    kind = torch.cat(
        [torch.zeros(tokens).long(), randint(1, len(names) - 1, nodes).sort().values, torch.tensor([len(names) - 1])]
    )
    pos = torch.cat([torch.arange(tokens), randint(0, tokens, nodes), torch.tensor([tokens - 1])])
    n = tokens + nodes + 1
    pair = (randint(0, n, edges) * n + randint(0, n, edges)).unique()
    source, target = pair // n, pair % n
    forward = (kind[source] < kind[target]) & (pos[source] <= pos[target])
    weight = torch.randn(int(forward.sum()), generator=generator) ** 3
    return AttributionGraph(
        tokens=torch.arange(tokens),
        words=tuple(f" word{i}" for i in range(tokens)),
        names=names,
        logits=(LogitTarget(3, tokens - 1, None, " Rome", 0.5),),
        kind=kind,
        index=torch.cat([torch.arange(tokens), torch.arange(nodes), torch.tensor([3])]),
        pos=pos,
        activation=torch.ones(n),
        importance=torch.rand(n, generator=generator),
        source=source[forward].int(),
        target=target[forward].int(),
        weight=weight,
        settings={"fixed": [], "importances": True, "min_weight": 0.0},
    )


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if chromium() is None:
        pytest.skip("no Chromium is installed")
    browser = Browser()
    yield browser
    browser.close()


def screen(browser: Browser, width: int, height: int = 800) -> None:
    browser.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)


STATE = """(async () => {
  await new Promise(done => setTimeout(done, 300));
  for (let i = 0; i < 3; i++) await new Promise(requestAnimationFrame);
  const texts = [...document.querySelectorAll(".graph svg text")], svg = document.querySelector(".graph svg");
  const inside = e => { const r = e.getBoundingClientRect(); return r.top >= 0 && r.bottom <= innerHeight && r.width > 0; };
  return {texts: texts.filter(inside).map(t => t.textContent), refused, wide: document.documentElement.scrollWidth - innerWidth,
    faint: document.querySelectorAll('.graph circle[opacity="0.12"]').length,
    drawn: document.querySelectorAll('.graph circle:not([display=none])').length,
    bold: [...document.querySelectorAll('.graph circle[stroke-width="3"]')].map(c => Number(c.dataset.node)),
    caption: document.querySelector("[id$=-caption]").textContent, address: location.hash};
})()"""
PRESS = """document.querySelector(".graph svg").dispatchEvent(new KeyboardEvent("keydown", {key: %s, bubbles: true}))"""
SEARCH = """(() => { const box = document.querySelector("input[type=search]"); box.value = %s;
  box.dispatchEvent(new Event("input")); })()"""


@pytest.mark.parametrize("width", [400, 800, 1400])
def test_names_and_tokens_are_in_view_at_every_width(browser, tmp_path, width):
    screen(browser, width)
    browser.open(picture(by_hand()).save(tmp_path / "graph.html"))
    state = browser.evaluate(STATE)
    assert {"a", "</b>", "x", "0 W_out:0", "0\u00a0W_O", "logits"} <= set(state["texts"])
    dashed = """[...document.querySelectorAll(".graph path")].filter(p => p.getAttribute("d"))
      .map(p => [p.getAttribute("stroke"), p.hasAttribute("stroke-dasharray")])"""
    assert {tuple(edge) for edge in browser.evaluate(dashed)} == {("#1f5fd0", False), ("#c2185b", True)}
    legend = browser.evaluate("document.querySelector('.legend').textContent")
    assert "raises" in legend and "lowers" in legend and "importance" in legend
    assert state["wide"] <= 0 and not state["refused"]


def test_a_graph_of_2000_nodes_in_30_layers_is_walked_through_by_search_and_keys(browser, tmp_path):
    screen(browser, 1400)
    graph = large()
    page = picture(graph, nodes=2000, edges=4000).save(tmp_path / "large.html")
    assert page.stat().st_size < 1_000_000
    browser.open(page)
    state = browser.evaluate(STATE)
    assert state["drawn"] == len(graph) and "400 edges" in state["caption"] and "·Rome" in state["texts"]
    assert sum(":" in text for text in state["texts"]) >= 10 and {"block 0", "block 28"} <= set(state["texts"])
    cut = """[...document.querySelectorAll(".graph svg g[clip-path] text")].filter(t =>
      t.getBBox().y < document.querySelector(".graph clipPath rect").y.baseVal.value).map(t => t.textContent)"""
    assert not browser.evaluate(cut)  # the names of the upper row are whole
    number = int(graph.is_subcomponent.nonzero()[7])
    label = graph.labels[number]
    browser.evaluate(SEARCH % json.dumps(label))
    state = browser.evaluate(STATE)
    assert state["bold"] == [number] and "1 node matches" in state["caption"] and state["faint"] == len(graph) - 1
    browser.evaluate(PRESS % '"n"')
    state = browser.evaluate(STATE)
    assert f"traced from {label}" in state["caption"] and state["bold"] == [number]
    assert browser.evaluate("document.querySelector('.tip').textContent").startswith(
        label
    )  # as the pointer would be told
    address = state["address"]
    assert json.loads(re.search(r"=(\{.*\})$", unquote(address))[1])["node"] == number
    browser.evaluate(PRESS % '"Escape"')
    assert not browser.evaluate(STATE)["bold"] and browser.evaluate("document.querySelector('.tip').hidden")
    for _ in range(3):
        browser.evaluate(PRESS % '"+"')
    assert browser.evaluate(STATE)["drawn"] < len(graph) / 2
    browser.evaluate(PRESS % '"0"')
    assert browser.evaluate(STATE)["drawn"] == len(graph)
    browser.evaluate(f"history.replaceState(null, '', {json.dumps(address)}), location.reload()")
    end, caption = time.monotonic() + 30, ""
    while f"traced from {label}" not in caption and time.monotonic() < end:
        with suppress(RuntimeError):  # the page is being loaded
            caption = browser.evaluate(STATE)["caption"]
    assert f"traced from {label}" in caption


def test_a_click_traces_and_hovering_tells(browser, tmp_path):
    screen(browser, 800)
    browser.open(picture(by_hand()).save(tmp_path / "graph.html"))
    place = browser.evaluate("(() => { const r = document.querySelector('[data-node=\"2\"]').getBoundingClientRect();"
                             " return [r.x + r.width / 2, r.y + r.height / 2]; })()")  # fmt: skip
    at = {"x": place[0], "y": place[1]}
    browser.send("Input.dispatchMouseEvent", type="mouseMoved", **at)
    assert "−3.00 ← embed@1\n" in browser.evaluate("document.querySelector('.tip').textContent")
    for kind in ("mousePressed", "mouseReleased"):
        browser.send("Input.dispatchMouseEvent", type=kind, button="left", buttons=1, clickCount=1, **at)
    assert "traced from blocks.0.attn.W_O:4@1" in browser.evaluate(STATE)["caption"]
    before = browser.evaluate(STATE)["address"]
    browser.send("Input.dispatchMouseEvent", type="mousePressed", button="left", buttons=1, clickCount=1, **at)
    for step in (20, 60):
        moved = {"x": at["x"] - step, "y": at["y"]}
        browser.send("Input.dispatchMouseEvent", type="mouseMoved", button="left", buttons=1, **moved)
    browser.send("Input.dispatchMouseEvent", type="mouseReleased", button="left", buttons=0, clickCount=1, **moved)
    state = browser.evaluate(STATE)
    assert "traced from blocks.0.attn.W_O:4@1" in state["caption"] and state["address"] != before


def test_the_view_is_saved_as_svg_and_as_png(browser, tmp_path):
    screen(browser, 800)
    browser.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    browser.open(picture(by_hand()).save(tmp_path / "graph.html"))
    for kind in ("svg", "png"):
        browser.evaluate(f"document.querySelector('[id$=-{kind}]').click()")
    paths = [Path(tmp_path) / f"attribution-graph.{kind}" for kind in ("svg", "png")]
    end = time.monotonic() + 30
    while not all(path.exists() for path in paths) and time.monotonic() < end:
        time.sleep(0.1)
    root = ET.parse(paths[0]).getroot()
    assert {"a", "</b>", "0 W_out:0"} <= {text.text for text in root.iter("{http://www.w3.org/2000/svg}text")}
    head = paths[1].read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:])
    assert (width, height) == (2 * int(float(root.get("width"))), 2 * int(float(root.get("height"))))
