"""The dashboard: its size for 10,000 subcomponents, and seconds until the first page is drawn. Writes ``dashboard.json``.

    python -m benchmarks.dashboard

*Full*: subcomponents of a random decomposition that fire everywhere, so that no window, table or list of neighbours has a free
place, with a vocabulary of 50,000 tokens; the size is measured on a few hundred of them and multiplied. Real ones need less.
The first page lists 10,000 subcomponents; seconds are those of headless Chromium until the table is drawn, the median of five.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from tests.campaigns.browser import Browser, chromium
from tests.tiny import decomposition_of, tiny_model
from tl_vpd import viz
from tl_vpd.analysis import DatasetGraphConfig, HarvestConfig, dataset_graph, harvest

WANTED = 10_000
DRAWN = "document.querySelectorAll('tbody tr').length"


def full_folder(folder: Path) -> int:
    """Writes the dashboard of full subcomponents; how many they are."""
    model = tiny_model(d_vocab=50_000, n_ctx=64, dtype=torch.float32)
    vpd = decomposition_of(model, C=30, spread=8.0)
    tokens = torch.randint(0, 400, (48, 64), generator=torch.Generator().manual_seed(0)) * 125
    harvested = harvest(vpd, model, tokens, config=HarvestConfig(samples=8, bins=20, lags=2))
    harvested = replace(harvested, names={token: f" token{token}" for token in harvested.names})
    labels = {str(c): "a label of about forty characters, as usual" for c in vpd.site_axis.subcomponents()}
    graph = dataset_graph(vpd, model, tokens[:2], config=DatasetGraphConfig(absolute=False))
    data = viz.DashboardData(labels=labels, graph=graph, prompts=tokens[:12])
    viz.dashboard(vpd, model, harvested, folder, data=data)
    return len(harvested)


def lengthened(folder: Path, times: int) -> None:
    """Repeats the list of the first page."""
    path = folder / "data" / "index.js"
    head, _, rest = path.read_text(encoding="ascii").partition("{")
    index: dict[str, Any] = json.loads("{" + rest.removesuffix(");\n"))
    n = len(index["index"])
    for name in ("site", "index", "mean", "density", "firings", "component"):
        index[name] = index[name] * times
    for name in index["scores"]:
        index["scores"][name] = index["scores"][name] * times
    index["labels"] = {str(i): index["labels"][str(i % n)] for i in range(n * times)}
    path.write_text(f"{head}{json.dumps(index, separators=(',', ':'))});\n", encoding="ascii")


def first_page(folder: Path) -> dict[str, float]:
    """Seconds from the address to the table, by the clock and of the page's thread on the processor."""
    browser, clock, processor = Browser(), [], []
    browser.send("Performance.enable", timeDomain="threadTicks")
    for _ in range(5):
        browser.send("Page.navigate", url="about:blank")
        began, used = time.perf_counter(), _thread_seconds(browser)
        browser.send("Page.navigate", url=(folder / "index.html").as_uri())
        while not browser.evaluate(DRAWN):
            time.sleep(0.005)
        clock.append(time.perf_counter() - began)
        processor.append(_thread_seconds(browser) - used)
    browser.close()
    return {"seconds": round(statistics.median(clock), 2), "cpu_seconds": round(statistics.median(processor), 2)}


def _thread_seconds(browser: Browser) -> float:
    metrics = browser.send("Performance.getMetrics")["metrics"]
    return float(next(m["value"] for m in metrics if m["name"] == "TaskDuration"))


def main() -> None:
    """Runs and writes."""
    options = harness.parser("dashboard", __doc__).parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "dashboard"
        began = time.process_time()
        n = full_folder(folder)
        seconds = time.process_time() - began
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        prompts = sum(
            path.stat().st_size for path in folder.glob("data/prompt-*.js")
        )  # whatever the number of subcomponents
        record: dict[str, Any] = {
            "subcomponents": n,
            "mb_per_10000": round((size - prompts) / 1e6 * WANTED / n + prompts / 1e6, 1),
            "mb_of_12_prompts": round(prompts / 1e6, 1),
            "cpu_seconds_per_10000": round(seconds * WANTED / n),
            "load": round(os.getloadavg()[0], 1),
        }
        if chromium() is not None:
            lengthened(folder, -(-WANTED // n))
            record["first_page"] = first_page(folder)
    print(record)
    harness.write(options.out, record, "dashboard")


if __name__ == "__main__":
    main()
