"""Draws docs/first_hour.png from benchmarks/results/first_hour.json: a good run, and three that fail.

python -m scripts.first_hour_picture
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from tl_vpd.viz.style import MODES, SERIES

ROOT = Path(__file__).parents[1]
RUNS = {
    "bundled": "good: the bundled\nmodel, all sites",
    "middle": "too little explained:\na block in the middle",
    "collapsed": "collapsed:\ncoefficients × 1,000",
    "dense": "dense:\ncoefficients × 1/1,000",
}


def draw(runs: dict[str, Any]) -> Figure:
    """Two rows by run: shares of the yardstick, and L0 as a share of all subcomponents."""
    figure = Figure(figsize=(8.0, 4.6), layout="constrained")
    axes = figure.subplots(2, len(RUNS), sharex=True, sharey="row", height_ratios=(1.5, 1))
    for (name, title), (top, bottom) in zip(RUNS.items(), axes.T, strict=True):
        run, steps = runs[name], runs[name]["config"]["steps"]
        history, checks = run["history"], run["checks"]
        x = [100 * (step + 1) / steps for step in history["step"]]
        looks = [100 * step / steps for step in checks["step"]]
        for label in ("adversarial", "stochastic"):
            shares = [100 * v / run["yardstick"] for v in history[label]]
            top.plot(x, shares, color=MODES[label], linewidth=1.0, label=label)
        rounded = {"color": MODES["rounded"], "markersize": 4, "linewidth": 1.5, "label": "rounded"}
        top.plot(looks, [100 * v for v in checks["share"]], "o-", **rounded)
        top.axhline(80, color=SERIES[3], linewidth=0.8, linestyle="--", label="warning")
        top.set_title(title, fontsize=9.5, loc="left")
        bottom.plot(looks, [100 * v / run["subcomponents"] for v in checks["l0"]], "o-", color=SERIES[5], markersize=4)
        bottom.set_xlabel("% of the run", fontsize=8.5)
        top.set_xscale("log")
        top.set_ylim(0, 115)
        bottom.set_ylim(0, 105)
        for panel in (top, bottom):
            panel.set_xticks([1, 10, 100], ["1", "10", "100"])
            panel.tick_params(labelsize=8)
            panel.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("% of what ablating costs", fontsize=8.5)
    axes[1, 0].set_ylabel("L0, % of all", fontsize=8.5)
    axes[0, -1].legend(fontsize=8, frameon=False, loc="center left")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/first_hour.json")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/first_hour.png")
    options = parser.parse_args()
    draw(json.loads(options.results.read_text(encoding="utf-8"))["runs"]).savefig(options.out, dpi=200)


if __name__ == "__main__":
    main()
