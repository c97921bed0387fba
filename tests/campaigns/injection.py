"""Texts that want to be code, in every place where data enters a picture or a page."""

from __future__ import annotations

import copy
import json
import random
import re
import tempfile
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from tests.analysis.test_graph_result import by_hand
from tests.campaigns.browser import Browser, chromium
from tests.campaigns.counts import Budget, Counts
from tests.tiny import decomposition_of, some_tokens, tiny_model
from tl_vpd import Evaluation, bundled, viz
from tl_vpd.analysis import Harvest, HarvestConfig, harvest
from tl_vpd.analysis.attention import AttentionByOffset, HeadNorms, ScoreTerms, StaticStrengths
from tl_vpd.site import Subcomponent
from tl_vpd.viz.evaluation import panels as evaluation_panels
from tl_vpd.viz.panel import Panel
from tl_vpd.viz.text import label

TRIED = """Texts that want to be code (tags, handlers, links, entities, TeX, scripts' ends, style, control characters, marks of
writing direction, replacement characters, 10,000 characters; alone and combined) stand in every title, caption, token, label,
site, axis and record of every picture, as a page and as a notebook shows it without a policy. In Chromium, hovering and clicking
included, nothing of them may run, fetch, open or become an element, the page's policy may have nothing to refuse, and the text
must be shown. Without Chromium, elements and attributes are compared with those of a harmless text."""
SHORT, LONG = Budget(3, 40), Budget(120, 540)

RUN = "ran.push(1)"
PAYLOADS = (
    f"<script>{RUN}</script>",
    f"</script><script>{RUN}</script>",
    f"<img src=x onerror={RUN}>",
    f"<svg onload={RUN}>",
    f'"><img src=x onerror="{RUN}">',
    f"'><img src=x onerror='{RUN}'>",
    f"<a href=javascript:{RUN}>link</a>",
    f'<a href="data:text/html,<script>{RUN}</script>">link</a>',
    '<a href="https://example.org/x">link</a>',
    f"<a href='#' onclick={RUN}>link</a>",
    "<b class=injected>bold</b>",
    "<br><i class=injected>x</i>",
    "&lt;b&gt;",
    "&amp;lt;",
    f"&#60;script&#62;{RUN}&#60;/script&#62;",
    f"\\u003cscript\\u003e{RUN}\\u003c/script\\u003e",
    f"]]><script>{RUN}</script>",
    f"--><script>{RUN}</script>",
    f"<!--<script>{RUN}//",
    f"<!-- {RUN}",
    f"'+({RUN})+'",
    f'"+({RUN})+"',
    f"${{{RUN}}}",
    f"`${{{RUN}}}`",
    f"\\');{RUN};//",
    f'\\");{RUN};//',
    "$\\href{javascript:ran.push(1)}{x}$",
    "$\\frac{$",
    "$x^2$",
    "%{text}<extra>",
    f"<iframe srcdoc='<script>parent.{RUN}</script>'></iframe>",
    "<style>*{display:none}</style>",
    "</style><b class=injected>",
    "</title><b class=injected>",
    "</td></table><b class=injected>",
    "</text></svg><b class=injected>",
    "<base href=//example.org>",
    "<meta http-equiv=refresh content=0;url=//example.org>",
    "<link rel=stylesheet href=//example.org/x>",
    "<form action=//e.org>",
    f"<math><mtext><script>{RUN}</script></mtext></math>",
    f"<details open ontoggle={RUN}>x</details>",
    f"<foreignObject><img src=x onerror={RUN}></foreignObject>",
    "<span style='position:fixed;inset:0'>x</span>",
    "a\x00b\x1b\x7f",
    "\u202egnp.exe\u2066\u2069\u200f",
    "\ufffd half \ufffd",
    "\u2028\u2029 lines",
    "e\u0301\u200d\u200b zero",
    "line\nline\ttab",
    "עברית العربية 12",
    "漢字 🙂 ﷽",
    "x" * 10_000,
    "<b>" * 3_000,
    "_underscore_",
    "{x:g}",
    "A&B<C>D\"E'F",
)
BEFORE, AFTER = (
    ("", '">', "'>", "</td>", "</script>", "-->", "]]>", "</text>", "\\"),
    ("", "<!--", '"', "'", "\\", "\u2028"),
)
HARMLESS = "harmless text"
HISTORY = ("step", "l0", "faithfulness", "stochastic", "adversarial", "importance", "frequency")

CHECK = r"""(async () => {
  const wait = ms => new Promise(done => setTimeout(done, ms));
  for (const span of document.querySelectorAll("[data-about]")) span.dispatchEvent(new MouseEvent("mouseenter"));
  let hovered = "";
  for (const node of document.querySelectorAll(".graph [data-node]")) {
    node.dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
    hovered += node.closest(".graph").querySelector(".tip").textContent;
  }
  const second = document.querySelectorAll(".graph [data-node=\"2\"]");
  for (const node of second) node.dispatchEvent(new MouseEvent("click", {bubbles: true}));
  for (const details of document.querySelectorAll("details")) details.open = true;
  await wait(100);
  const foreign = ".injected, iframe, object, embed, img, form, base, link, audio, video, math, foreignObject" +
    ", [http-equiv=refresh]";
  const bad = [...document.querySelectorAll("*")].filter(e => e.matches(foreign) || [...e.attributes].some(
    a => /^on/i.test(a.name) || (/href$/i.test(a.name) && !a.value.startsWith("#")) ||
      (!a.name.startsWith("data-") && /javascript:/i.test(a.value))));
  // circuitsvis asks for WebAssembly when it loads, and does without.
  return {ran, refused: refused.filter(what => what !== "script-src wasm-eval "), hovered,
          bad: bad.map(e => e.outerHTML.slice(0, 150)),
          texts: [...document.querySelectorAll("section.tlvpd")].map(s => s.textContent)};
})()"""


class Places:
    """What does not depend on the text: a harvest, and reports."""

    def __init__(self) -> None:
        model = tiny_model(torch.float32)
        vpd = decomposition_of(model)
        self.harvest: Harvest = harvest(
            vpd, model, some_tokens(shape=(6, 7)), config=HarvestConfig(windows=2, radius=2)
        )
        self.address = str(max(vpd.site_axis.subcomponents(), key=lambda a: len(self.harvest[a].windows)))
        self.record = bundled.evaluation().record

    def panels(self, text: str) -> list[tuple[Panel, bool]]:
        """Every picture with a text wherever one can stand, and whether the text must be readable in it."""
        harvested = replace(self.harvest, names=dict.fromkeys(self.harvest.names, text))
        table = pd.DataFrame({text: [text, "x"], "n": [1, 2]}, index=pd.Index([text, "b"], name=f"{text} index"))
        scores = torch.zeros(1, 1, 3, 3)
        terms = ScoreTerms(
            0, torch.tensor([[1, 2, 3]]), *(scores,) * 5, ((Subcomponent(text, 1), "bias"),), scores[None]
        )
        ends, zeros = (Subcomponent(text, 1),), torch.zeros(1)
        static = StaticStrengths(0, ends, ends, torch.arange(3), torch.rand(1, 1, 1, 3), zeros, zeros + 1)
        history = pd.DataFrame({name: [1.0, 2.0] for name in HISTORY})
        pictures = [
            self.graph(text),
            viz.subcomponent(harvested, self.address, note=text),
            viz.table(table, text, note=text),
            viz.pair_attention(terms, [text] * 3),
            viz.static_strengths(static),
            viz.attention_by_offset(AttentionByOffset(0, (text,), torch.rand(1, 3), torch.rand(1, 3))),
            viz.head_norms(HeadNorms(0, {text: torch.rand(2, 2)}), title=text),
            viz.losses(history, title=text),
        ]
        readable = ("Verdict", "Mask modes", "Curves", "Adversaries and their budgets", "Sites")
        return [(p, True) for p in pictures] + [(p, p.title in readable) for p in evaluation_panels(self.report(text))]

    def graph(self, text: str) -> Panel:
        """A graph whose words, sites, logits and title are the text."""
        graph = by_hand()
        names = ("embed", f"{text}1", f"{text}2", f"{text}3", "logits")
        logits = tuple(replace(target, text=text) for target in graph.logits)
        return viz.graph(replace(graph, words=(text, text), names=names, logits=logits), title=text)

    def report(self, text: str) -> Evaluation:
        """A report whose sites, data, adversaries, controls and reasons are the text."""
        record = copy.deepcopy(self.record)
        for name in ("l0_by_site", "alive_by_site", "built_by_site"):
            record[name] = {f"{text}{i}": value for i, value in enumerate(record[name].values())}
        attack = {"pieces": "learned", "adversary": text, "steps": 2, "kl": 0.5, "kl_low": 0.4, "kl_high": 0.6}
        record["tables"] = {"adversaries": [attack, {**attack, "pieces": text}]}
        record["controls"] = {text: record["controls"]["random"], "random": record["controls"]["random"]}
        record["left_out"] = {text: text, "hidden": text}
        return Evaluation(record)


def run(budget: Budget, seed: int) -> Counts:
    """The campaign."""
    counts, places = Counts(), Places()
    torch.manual_seed(0)
    browser = Browser() if chromium() else None
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "page.html"
            for i in budget.tries_left():
                text = payload(i, seed)
                pictures = places.panels(text)
                viz.page([p for p, _ in pictures], text, path, introduction=text)
                if browser is None:
                    same = skeleton(path.read_text("utf-8")) == skeleton(written(places, HARMLESS, path))
                    counts.add("nothing but text" if same else "silent", f"text {text[:80]!r}", len(pictures))
                    continue
                judge(browser, path, text, pictures, counts, "page")
                fragments = "\n".join(p.html for p, _ in pictures)
                path.write_text(f"<!DOCTYPE html><meta charset=utf-8><body>{fragments}", encoding="utf-8")
                judge(browser, path, text, pictures, counts, "notebook")
    finally:
        if browser is not None:
            browser.close()
    return counts


def payload(i: int, seed: int) -> str:
    """The i-th text: those of the list in an order of the seed, then combinations."""
    rng = random.Random(seed)
    if i < len(PAYLOADS):
        return rng.sample(PAYLOADS, len(PAYLOADS))[i]
    rng = random.Random(f"{seed}:{i}")
    return rng.choice(BEFORE) + "".join(rng.sample(PAYLOADS, 2)) + rng.choice(AFTER)


def judge(
    browser: Browser, path: Path, text: str, pictures: list[tuple[Panel, bool]], counts: Counts, form: str
) -> None:
    """Opens a page and counts an outcome for each of its pictures."""
    browser.open(path)
    state: dict[str, Any] = browser.evaluate(CHECK)
    wrong = [f"{name}: {state[name]}" for name in ("ran", "refused", "bad") if state[name]]
    for event in browser.events:
        method, what = event["method"], event["params"]
        url = what.get("request", {}).get("url", "")
        if method == "Network.requestWillBeSent" and url != path.as_uri():
            wrong.append(f"fetched {url[:100]}")
        if method in ("Page.javascriptDialogOpening", "Runtime.exceptionThrown", "Page.frameRequestedNavigation"):
            wrong.append(f"{method} {json.dumps(what)[:300]}")
        if method == "Log.entryAdded" and what["entry"]["level"] == "error":
            wrong.append(f"console: {what['entry']['text'][:200]}")
    if wrong:
        counts.add("silent", f"{form} of {text[:80]!r}: {wrong}")
        return
    expected = squeezed(label(text))[:15]
    if len(state["texts"]) != len(pictures):
        counts.add("silent", f"{form} of {text[:80]!r}: {len(state['texts'])} of {len(pictures)} pictures are there")
        return
    for (panel, readable), shown in zip(pictures, state["texts"], strict=True):
        there = expected in squeezed(shown) or not readable
        counts.add("shown as text" if there else "silent", f"{form} of {text[:80]!r}: not in {panel.title[:40]!r}")
    if state["hovered"]:
        there = expected in squeezed(state["hovered"])
        counts.add(
            "shown as text" if there else "silent", f"{form} of {text[:80]!r}: not where the graph is hovered over"
        )


def squeezed(text: str) -> str:
    """Without spaces and the signs that stand for them."""
    return re.sub(r"[\s·⏎⇥\u00a0]", "", text)


def written(places: Places, text: str, path: Path) -> str:
    """The page of a text."""
    return viz.page([p for p, _ in places.panels(text)], text, path, introduction=text).read_text("utf-8")


def skeleton(page: str) -> Counter[Any]:
    """How often each element with its attributes' names and links is in a page; of plots, whose ticks depend on texts, which."""
    parser = _Skeleton()
    parser.feed(page)
    parser.close()
    return parser.elements


class _Skeleton(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.elements: Counter[Any] = Counter()
        self.in_plot = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        links = tuple(value for name, value in attrs if name == "href")
        self.in_plot |= tag == "svg"
        key = tag, tuple(sorted(name for name, _ in attrs)), () if self.in_plot and tag == "use" else links
        self.elements[key] = 1 if self.in_plot else self.elements[key] + 1

    def handle_endtag(self, tag: str) -> None:
        self.in_plot &= tag != "svg"
