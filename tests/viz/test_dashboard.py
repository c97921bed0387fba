"""The dashboard: its data against the harvest, hostile texts, and the pages in Chromium where it is installed."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from tests.campaigns.browser import Browser, chromium
from tests.tiny import decomposition_of, some_tokens, tiny_model
from tl_vpd import bundled, viz
from tl_vpd.analysis import (
    ClusterConfig,
    DatasetGraphConfig,
    HarvestConfig,
    ablation_table,
    cluster,
    component_edges,
    dataset_graph,
    harvest,
    logit_effects,
)
from tl_vpd.analysis.labels import Label, Labels
from tl_vpd.cli import app
from tl_vpd.viz.dashboard.labels import labels_and_scores
from tl_vpd.viz.dashboard.records import spread
from tl_vpd.viz.text import label

HOSTILE = '</script><script>window.ran.push(1)</script><img src=x onerror="window.ran.push(2)">\'"\u2028 \n'
FIRST, LABELLED = "blocks.0.attn.W_Q:0", "blocks.1.mlp.W_out:4"
CONFIG = HarvestConfig(windows=3, radius=2, samples=3, bins=4, lags=1)


def read(folder: Path, name: str) -> Any:
    """The value in a file of data."""
    text = (folder / "data" / f"{name}.js").read_text(encoding="ascii")
    match = re.fullmatch(r'tlVpd\.put\("([a-z0-9-]+)", (.*)\);\n', text)
    assert match and match[1] == name
    return json.loads(match[2])


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> SimpleNamespace:
    """A dashboard in which every token, every label and the title are hostile."""
    model = tiny_model()
    vpd = decomposition_of(model).to(torch.float64)
    tokens = some_tokens(shape=(6, 7))
    plain = harvest(vpd, model, tokens, config=CONFIG)
    hostile = {i: f"{i}{HOSTILE}" for i in range(model.cfg.d_vocab)}
    harvested = replace(plain, names=hostile)
    addresses = [str(a) for a in vpd.site_axis.subcomponents()]
    table = pd.DataFrame({"subcomponent": addresses, "label": None, "intruder": range(len(addresses)), "note": "x"})
    table.loc[table["subcomponent"] == LABELLED, "label"] = f"opens a quotation {HOSTILE}"
    table.loc[3, "intruder"] = float("nan")
    table.loc[len(table)] = ["component:0", "a   component", float("nan"), "x"]
    clustering = cluster(vpd, model, tokens, config=ClusterConfig(alpha=0.1))
    folder = tmp_path_factory.mktemp("pages") / "dashboard"
    config = viz.DashboardConfig(title=HOSTILE, windows=2, samples=2, radius=1, min_count=1, logits=2)
    graph = dataset_graph(vpd, model, tokens, config=DatasetGraphConfig(absolute=False))
    ablations = ablation_table(vpd, model, tokens[:2], lambda logits: logits[:, -1].std(), addresses[:5])
    data = viz.DashboardData(clustering, table, graph, ablations, prompts=tokens[:3])
    viz.dashboard(vpd, model, harvested, folder, data=data, config=config)
    return SimpleNamespace(**{k: v for k, v in locals().items() if k != "tmp_path_factory"})


def test_the_data_are_those_of_the_harvest(world):
    index = read(world.folder, "index")
    addresses = [f"{index['sites'][s]}:{i}" for s, i in zip(index["site"], index["index"], strict=True)]
    assert addresses == world.addresses
    assert index["firings"] == world.harvested.firings.tolist()
    assert index["mean"] == pytest.approx(world.harvested.mean_importance.tolist(), rel=0.006)
    effects = logit_effects(world.vpd, world.model, k=2)
    for place, address in enumerate(addresses):
        one = world.harvested[address]
        record = read(world.folder, f"{index['files'][index['site'][place]]}-0")[str(index["index"][place])]
        for stored, windows in ((record["windows"], one.windows[:2]), (record["samples"], spread(one.samples, 2))):
            assert len(stored) == len(windows)
            for (row, pos, peak, ids, g, a), window in zip(stored, windows, strict=True):
                inside = slice(max(0, window.peak - 1), window.peak + 2)
                assert (row, pos, peak) == (window.row, window.pos, window.peak - inside.start)
                assert [index["tokens"][t] for t in ids] == [label(text) for text in window.tokens[inside]]
                assert g == pytest.approx([100 * x for x in window.importances[inside].tolist()], abs=0.51)
                scaled = [x * record["scale"] / 100 for x in a]
                assert scaled == pytest.approx(window.activations[inside].tolist(), abs=0.01 * record["scale"])
        table = one.input_tokens(10, min_count=1)
        assert [row[1] for row in record["inputs"]] == table["count"].tolist()
        assert [row[3] for row in record["inputs"]] == pytest.approx((100 * table["pmi"]).tolist(), abs=0.51)
        assert record["histogram"] == one.histogram.tolist()
        near = one.neighbours(12, min_count=1)
        assert [addresses[row[0]] for row in record["neighbours"]] == near["subcomponent"].tolist()
        assert [row[1] for row in record["neighbours"]] == near["lag"].tolist()
        assert len(record["heads"]) == (2 if ".attn." in address else 0)
        expected = effects[address]["logit"].tolist() if address in effects else []
        assert [row[1] for row in record["logits"]] == pytest.approx(expected, rel=0.006)
    assert index["scores"]["ablation"][:5] == pytest.approx(world.ablations["change"].tolist(), rel=0.006)
    assert set(index["scores"]["ablation"][5:]) == {None}
    members = [[addresses[i] for i in c["members"]] for c in index["components"]]
    assert members == [[str(m) for m in c.members] for c in world.clustering]
    assert index["components"][0]["label"] == "a   component"
    assert index["scores"]["intruder"][3] is None and index["scores"]["intruder"][5] == 5
    assert set(index["scores"]) == {"intruder", "ablation"}


def records_of(world) -> Iterator[tuple[str, Any]]:
    """Address and record of every subcomponent."""
    index = read(world.folder, "index")
    for place, address in enumerate(world.addresses):
        yield address, read(world.folder, f"{index['files'][index['site'][place]]}-0")[str(index["index"][place])]


def test_edges_are_the_strongest_of_the_graph(world):
    seen = 0
    for address, record in records_of(world):
        if address not in map(str, world.graph.nodes):
            assert record["into"] == record["from"] == []
            continue
        for side, end, other in (("into", "target", "source"), ("from", "source", "target")):
            table = world.graph.top_edges(8, **{end: address})
            names = [world.addresses[i] if i >= 0 else "embed" for i, _ in record[side]]
            assert names == table[other].tolist()
            assert [w for _, w in record[side]] == pytest.approx(table["signed"].tolist(), rel=0.006)
            seen += len(names)
    assert seen > 50
    components = read(world.folder, "index")["components"]
    table = component_edges(world.graph, world.clustering)
    table = table[table.source.str.startswith("component") & table.target.str.startswith("component")]
    for number, component in enumerate(components):
        expected = table[table.target == f"component:{number}"].head(8)
        edges = [edge for edge in component["into"] if edge[0] >= 0]
        assert [f"component:{i}" for i, _ in edges] == expected.source.tolist()[: len(edges)]
        assert [w for _, w in edges] == pytest.approx(expected.weight.tolist()[: len(edges)], rel=0.006)


@torch.no_grad()
def test_heads_of_other_blocks_are_those_of_the_weights(world):
    cfg = world.model.cfg
    seen = 0
    for address, record in records_of(world):
        site, index = address.rpartition(":")[0], int(address.rpartition(":")[2])
        layer, writes = int(site.split(".")[1]), site.endswith(("W_O", "W_out"))
        expected = {}
        for other in range(layer + 1, cfg.n_layers) if writes else range(layer):
            attention = world.model.blocks[other].attn
            for head in range(cfg.n_heads):
                W = attention.W_V[head] @ attention.W_O[head]
                vector = world.vpd.U[site][index] if writes else world.vpd.V[site][:, index]
                moved = vector @ W if writes else W @ vector
                expected[other, head] = float(moved.norm() / vector.norm() / W.norm() * cfg.d_model**0.5)
        best = sorted(expected.items(), key=lambda item: -item[1])[:4]
        assert [(b, h) for b, h, _ in record["passed"]] == [pair for pair, _ in best]
        assert [x for *_, x in record["passed"]] == pytest.approx([x for _, x in best], abs=0.0051)
        seen += len(best)
    assert seen > 50


def test_prompts_have_the_importances_of_their_tokens(world):
    index = read(world.folder, "index")
    ci = world.vpd.causal_importances(world.model, world.tokens[:3])
    best = world.model(world.tokens[:3]).softmax(-1).max(-1)
    assert len(index["prompts"]) == 3
    for row in range(3):
        record = read(world.folder, f"prompt-{row}")
        assert [index["tokens"][t] for t in record["tokens"]] == [
            label(world.hostile[t]) for t in world.tokens[row].tolist()
        ]
        assert [p for _, p in record["next"]] == pytest.approx((100 * best.values[row]).tolist(), abs=0.51)
        for pos, listed in enumerate(record["at"]):
            g = {place: x for place, x in enumerate((100 * ci.concatenated[row, pos]).round().int().tolist()) if x}
            assert {place: x for place, x, _ in listed} == g
            assert len(listed) == len(g)
            assert [x for _, x, _ in listed] == sorted((x for _, x, _ in listed), reverse=True)


def test_no_text_is_markup_in_any_file(world):
    for path in world.folder.rglob("*.*"):
        text = path.read_text(encoding="utf-8")
        assert "<img" not in text
        if path.suffix == ".js":
            assert "<" not in text and "\u2028" not in text
        else:
            assert text.count("<script") == 1 == text.count("</script")
        assert "http" not in text.replace("http-equiv", "")


def test_what_is_wrong_is_said(world, tmp_path):
    def made(**options: Any) -> Path:
        arguments = {"harvested": world.harvested, "folder": tmp_path / "new", **options}
        return viz.dashboard(world.vpd, world.model, **arguments)

    with pytest.raises(KeyError, match=r"labels has blocks\.0\.attn\.W_Q:9, which was not harvested"):
        made(data=viz.DashboardData(labels={"blocks.0.attn.W_Q:9": "text"}))
    with pytest.raises(ValueError, match="'subcomponent' is needed"):
        made(data=viz.DashboardData(labels=pd.DataFrame({"label": ["x"]})))
    with pytest.raises(ValueError, match=r"has blocks\.0\.attn\.W_Q:0 twice"):
        made(data=viz.DashboardData(labels=pd.DataFrame({"subcomponent": [FIRST, FIRST], "label": ["x", "y"]})))
    with pytest.raises(ValueError, match="'subcomponent' and 'change' are needed"):
        viz.DashboardData(ablations=pd.DataFrame({"subcomponent": [FIRST]}))
    with pytest.raises(FileExistsError):
        made(folder=world.folder)
    with pytest.raises(ValueError, match="harvest is of another decomposition"):
        made(harvested=replace(world.harvested, norm=2 * world.harvested.norm))
    other = decomposition_of(world.model, C=3).to(torch.float64)
    with pytest.raises(ValueError, match="harvest is of a decomposition with other sites"):
        viz.dashboard(other, world.model, world.harvested, tmp_path / "new")
    elsewhere = harvest(other, world.model, world.tokens, config=HarvestConfig(windows=1))
    with pytest.raises(ValueError, match="clustering is of a decomposition with other sites"):
        viz.dashboard(other, world.model, elsewhere, tmp_path / "new", data=viz.DashboardData(world.clustering))
    with pytest.raises(IndexError, match="does not exist"):
        viz.dashboard(other, world.model, elsewhere, tmp_path / "new", data=viz.DashboardData(graph=world.graph))
    assert not list(tmp_path.iterdir())


def test_without_anything_optional(world, tmp_path):
    plain = harvest(world.vpd, world.model, world.tokens, [FIRST], config=HarvestConfig(windows=1))
    made = Labels({FIRST: Label("first", source="by hand")})
    data = viz.DashboardData(labels=made, graph=world.graph)
    page = viz.dashboard(world.vpd, world.model, plain, tmp_path / "small", data=data)
    record = read(page.parent, "site-0-0")["0"]
    assert {place for place, _ in record["into"]} <= {-1} and record["from"] == []  # the only one with a page
    assert record["samples"] == record["histogram"] == record["neighbours"] == record["logits"] == []
    assert read(page.parent, "index")["labels"] == {"0": "first"}


def test_the_command(tmp_path):
    model, tokens = bundled.model(), bundled.tokens("validation")
    small = bundled.decomposition().compact(model, tokens[:1, :16], threshold=0.95)
    small.save(tmp_path / "small")
    address = str(next(iter(small.site_axis.subcomponents())))
    (tmp_path / "labels.csv").write_text(f"subcomponent,label,score\n{address},the first,0.5\n", encoding="utf-8")
    arguments = ["dashboard", str(tmp_path / "small"), "--rows", "2", "--labels", str(tmp_path / "labels.csv")]
    arguments += ["--prompts", "2", "--graph-rows", "1", "--out", str(tmp_path / "pages")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    index = read(tmp_path / "pages", "index")
    assert len(index["index"]) == small.site_axis.total and index["title"] == "Subcomponents of small"
    assert index["labels"] == {"0": "the first"} and index["scores"]["score"][:2] == [0.5, None]
    assert sum(len(c["members"]) for c in index["components"]) > 0
    assert len(index["prompts"]) == 2 and any(x for x in index["scores"]["ablation"])
    assert any(read(tmp_path / "pages", f"{file}-0")[str(0)]["into"] for file in index["files"][1:])
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2 and "is not an empty folder" in again.output
    missing = CliRunner().invoke(app, [*arguments[:-1], str(tmp_path / "new"), "--labels", str(tmp_path / "none.csv")])
    assert missing.exit_code == 2 and "none.csv does not exist" in missing.output.replace("\n", "")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium."""
    if chromium() is None:
        pytest.skip("neither chromium nor google-chrome is installed to open the pages")
    browser = Browser()
    yield browser
    browser.close()


READY = """new Promise((done, failed) => { const end = Date.now() + 20000; (function look() {
  const ready = document.body && document.body.dataset.ready;
  if (ready && ready === (location.hash || "#")) done(document.querySelector("main").textContent);
  else if (Date.now() > end) failed(new Error("not ready: " + ready)); else setTimeout(look, 20); })(); })"""
ROWS = "[...document.querySelectorAll('main tbody tr')].map(r => r.cells[0].textContent)"


def go(browser: Browser, world: SimpleNamespace, page: str) -> str:
    """Opens a page; its text."""
    browser.send("Page.navigate", url="about:blank")
    browser.events.clear()
    browser.send("Page.navigate", url=f"{world.folder.as_uri()}/{page}")
    browser.evaluate("new Promise(done => setTimeout(done, 50))")
    return browser.evaluate(READY)


def check_nothing_ran(browser: Browser) -> None:
    assert browser.evaluate("window.ran") == [] and browser.evaluate("window.refused") == []
    urls = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert urls and all(url.startswith("file:") for url in urls)
    errors = [e for e in browser.events if e["method"] == "Runtime.exceptionThrown"]
    assert not errors


def test_the_index_is_searched_and_sorted(browser, world):
    text = go(browser, world, "index.html#all=1")
    assert "72 subcomponents" in text
    assert browser.evaluate("document.querySelector('h1').textContent") == label(HOSTILE)
    assert len(browser.evaluate(ROWS)) == 72
    mean = world.harvested.mean_importance
    order = [world.addresses[i] for i in sorted(range(72), key=lambda i: (-float(f"{mean[i]:.3g}"), i))]
    assert browser.evaluate(ROWS) == order
    browser.evaluate("document.querySelector('[data-key=\"score.intruder\"]').click()")
    first = browser.evaluate(ROWS)
    assert first[:2] == [world.addresses[71], world.addresses[70]] and first[-1] == world.addresses[3]
    browser.evaluate("document.querySelector('[data-key=\"score.intruder\"]').click()")
    assert browser.evaluate(ROWS)[0] == FIRST
    type_in = (
        "(t => { const e = document.getElementById('search'); e.value = t; e.dispatchEvent(new Event('input')); })"
    )
    browser.evaluate(f"{type_in}('QUOTATION opens')")
    assert browser.evaluate(ROWS) == [LABELLED]
    browser.evaluate(f"{type_in}('mlp.W_in:2')")
    assert sorted(browser.evaluate(ROWS)) == ["blocks.0.mlp.W_in:2", "blocks.1.mlp.W_in:2"]
    change = "(e => { e.value = 'blocks.1.mlp.W_in'; e.dispatchEvent(new Event('change')); })"
    browser.evaluate(f"{change}(document.getElementById('site'))")
    assert browser.evaluate(ROWS) == ["blocks.1.mlp.W_in:2"]
    address = browser.evaluate("location.hash")
    assert go(browser, world, f"index.html{address}") and browser.evaluate(ROWS) == ["blocks.1.mlp.W_in:2"]
    check_nothing_ran(browser)


def wait_for_page(browser: Browser, name: str) -> None:
    """Until a page has taken the place of the one before, with which an evaluation in progress ends."""
    for _ in range(100):
        with suppress(RuntimeError):
            if browser.evaluate("location.pathname").endswith(name):
                break
        time.sleep(0.1)
    browser.evaluate(READY)


def test_pages_lead_to_the_next_and_to_components(browser, world):
    text = go(browser, world, "subcomponent.html#blocks.0.attn.W_Q%3A1")
    assert text.count("importance") > 3
    assert browser.evaluate("document.querySelector('h1').textContent") == "blocks.0.attn.W_Q:1"
    one = world.harvested["blocks.0.attn.W_Q:1"]
    shown = browser.evaluate("[...document.querySelectorAll('.text')].map(e => e.children.length)")
    assert sum(shown) > 0 and len(shown) == len(one.windows[:2]) + len(spread(one.samples, 2))
    first = browser.evaluate("document.querySelector('.text span').textContent")
    assert first == label(one.windows[0].tokens[max(0, one.windows[0].peak - 1)])
    tokens = browser.evaluate("[...document.querySelectorAll('.tok')].map(e => e.textContent)")
    assert tokens[0] == label(one.input_tokens(1, min_count=1)["token"][0]).replace(" ", "·")
    alive = [a for a in world.addresses if world.harvested[a].mean_importance > 1e-6]
    after = alive[alive.index("blocks.0.attn.W_Q:1") + 1]
    browser.evaluate("document.getElementById('next').click()")
    browser.evaluate(READY)
    assert browser.evaluate("document.querySelector('h1').textContent") == after
    browser.evaluate("dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowLeft' }))")
    browser.evaluate(READY)
    assert browser.evaluate("document.querySelector('h1').textContent") == "blocks.0.attn.W_Q:1"
    check_nothing_ran(browser)
    go(browser, world, f"subcomponent.html#{LABELLED}")
    assert browser.evaluate("document.querySelector('.label').textContent") == label(f"opens a quotation {HOSTILE}")
    ends = "[...document.querySelectorAll('.card')].filter(e => e.querySelector('h2').textContent === 'Edges')[0]"
    ends = f"[...{ends}.querySelectorAll('tbody tr')].map(r => r.cells[0].textContent)"
    sources = world.graph.top_edges(8, target=LABELLED)["source"].replace("embed", "embeddings").tolist()
    assert sources and browser.evaluate(ends) == sources  # nothing reads the last block's output but the logits
    browser.evaluate("document.querySelector('.facts a').click()")
    wait_for_page(browser, "/component.html")
    component = world.clustering.of(LABELLED)
    assert browser.evaluate("document.querySelector('h1').textContent") == f"Component {component.number}"
    members = [str(member) for member in component.members]
    assert browser.evaluate(ROWS)[: len(members)] == members
    shown = [
        edge for side in ("into", "from") for edge in read(world.folder, "index")["components"][component.number][side]
    ]
    names = ["embeddings" if i < 0 else f"component {i}" for i, _ in shown]
    assert names and browser.evaluate(ends) == names
    check_nothing_ran(browser)


def test_addresses_that_do_not_exist_and_missing_files_are_said(browser, world, tmp_path):
    assert "There is no subcomponent <b>x</b>" in go(browser, world, "subcomponent.html#%3Cb%3Ex%3C%2Fb%3E")
    assert "There is no component 999" in go(browser, world, "component.html#999")
    assert "a·×3component" in go(browser, world, "component.html#0")  # a browser would show one space
    for page in ("subcomponent.html", "index.html"):
        (tmp_path / page).write_text((world.folder / page).read_text(encoding="utf-8"), encoding="utf-8")
    text = go(browser, SimpleNamespace(folder=tmp_path), "index.html")
    assert "cannot be shown" in text and "data/index.js is missing" in text


def test_prompts_are_looked_at_token_by_token(browser, world):
    text = go(browser, world, "prompts.html#prompt=1")
    assert text.startswith("All subcomponentsPrompts‹ previousnext ›Prompt 1")
    tokens = browser.evaluate("[...document.querySelectorAll('.text a')].map(e => e.textContent)")
    index = read(world.folder, "index")
    record = read(world.folder, "prompt-1")
    assert tokens == [index["tokens"][t] for t in record["tokens"]]
    browser.evaluate("document.querySelectorAll('.text a')[4].click()")
    browser.evaluate(READY)
    rows = (
        "[...document.querySelectorAll('#token tbody tr')].map(r => [...r.cells].slice(0, 2).map(c => c.textContent))"
    )
    shown = browser.evaluate(rows)
    expected = [[world.addresses[i], g / 100] for i, g, _ in record["at"][4]]
    assert [[name, float(g)] for name, g in shown] == expected
    change = "(e => { e.value = 'blocks.1.mlp.W_in'; e.dispatchEvent(new Event('change')); })"
    browser.evaluate(f"{change}(document.getElementById('site'))")
    browser.evaluate(READY)
    assert [name for name, _ in browser.evaluate(rows)] == [a for a, _ in expected if a.startswith("blocks.1.mlp.W_in")]
    heads = browser.evaluate("[...document.querySelectorAll('.heat tbody th')].map(e => e.textContent)")
    sums: dict[str, int] = {}
    for listed in record["at"]:
        for i, g, _ in listed:
            if world.addresses[i].startswith("blocks.1.mlp.W_in"):
                sums[world.addresses[i]] = sums.get(world.addresses[i], 0) + g
    assert [f"blocks.{name}" for name in heads] == sorted(sums, key=lambda a: (-sums[a], world.addresses.index(a)))
    check_nothing_ran(browser)
    browser.evaluate("document.querySelector('.heat tbody th a').click()")
    wait_for_page(browser, "/subcomponent.html")
    assert browser.evaluate("document.querySelector('h1').textContent") == f"blocks.{heads[0]}"
    check_nothing_ran(browser)
    assert "There is no such prompt" in go(browser, world, "prompts.html#prompt=99")
    assert "Prompt 0" in go(browser, world, "prompts.html")


CONTRASTS = """(() => {
  const parts = c => c.match(/[\\d.]+/g).map(Number);
  const card = parts(getComputedStyle(document.querySelector(".card")).backgroundColor);
  const light = c => c.map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  return [...document.querySelectorAll(".text span, .text a")].map(function (e) {
    const [r, g, b, a] = [...parts(getComputedStyle(e).backgroundColor), 1];
    const ink = light(parts(getComputedStyle(e).color).slice(0, 3));
    const ground = light([r, g, b].map((c, i) => a * c + (1 - a) * card[i]));
    return (Math.max(ink, ground) + .05) / (Math.min(ink, ground) + .05);
  });
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_tokens_are_legible_on_every_importance(browser, world, scheme):
    browser.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    for page in (f"subcomponent.html#{FIRST}", "prompts.html#prompt=1"):
        go(browser, world, page)
        contrasts = browser.evaluate(CONTRASTS)
        assert contrasts and min(contrasts) >= 4.5
    browser.send("Emulation.setEmulatedMedia", features=[])


def test_scores_that_nothing_has_are_no_column(world):
    scored = pd.DataFrame({"subcomponent": [FIRST], "label": ["x"], "detection": [float("nan")], "intruder": [0.5]})
    assert labels_and_scores(scored, {FIRST: 0}) == ({FIRST: "x"}, {"intruder": {FIRST: 0.5}})


@pytest.mark.parametrize("width", [360, 800])
def test_nothing_is_wider_than_the_screen(browser, world, width):
    browser.send("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=True)
    for page in ("index.html", f"subcomponent.html#{FIRST}", "component.html#0", "prompts.html#prompt=0&token=2"):
        go(browser, world, page)
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
    browser.send("Emulation.clearDeviceMetricsOverride")
