"""The curves of an evaluation's page: attacks by their steps, and distance against L0, beside the controls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from tl_vpd.viz.svg import svg

COLOURS = {
    "learned": "#1f5fd0",
    "random": "#c2185b",
    "singular": "#e07b00",
    "shuffled": "#6b7484",
    "untrained": "#2e8b57",
}
"""Colour of each kind of pieces."""


def curves(record: Mapping[str, Any]) -> str:
    """An ``<svg>`` of the curves that a record has (empty: none).

    Raises:
        ImportError: matplotlib is not installed.
    """
    tables = record.get("tables", {})
    plots = {"adversaries": _plot_attacks, "sparsity_sweep": _plot_sweep}
    shown = {name: pd.DataFrame(tables[name]) for name in plots if tables.get(name)}
    if not shown:
        return ""
    zero = record["kl"]["zero"]

    def draw(figure: Any) -> None:
        for (name, rows), axes in zip(shown.items(), figure.subplots(1, len(shown), squeeze=False)[0], strict=True):
            plots[name](axes, rows)
            if zero is not None:
                axes.axhline(zero, color="#6b7484", linestyle=":", linewidth=1, label="everything ablated")
            _finish(axes)

    return svg((5.2 * len(shown), 3.6), draw)


def _plot_attacks(axes: Any, attacks: pd.DataFrame) -> None:
    for name, group in attacks[attacks["pieces"] == "learned"].groupby("adversary", sort=False):
        axes.plot(group["steps"], _floats(group["kl"]), marker="o", markersize=4, linewidth=1.3, label=str(name))
    for name, group in attacks[attacks["pieces"] != "learned"].groupby("pieces", sort=False):
        colour = COLOURS.get(str(name))
        axes.plot(group["steps"], _floats(group["kl"]), "x", color=colour, label=f"shared, {name} pieces")
    axes.set_title("distance under attack, by steps", fontsize=9.5, loc="left")
    axes.set_xlabel("steps (steps × size = 2)")


def _plot_sweep(axes: Any, sweep: pd.DataFrame) -> None:
    for name, group in sweep.groupby("pieces", sort=False):
        colour = COLOURS.get(str(name))
        axes.plot(group["l0"], _floats(group["kl"]), marker=".", linewidth=1.3, color=colour, label=str(name))
        axes.fill_between(group["l0"], _floats(group["kl_low"]), _floats(group["kl_high"]), color=colour, alpha=0.15)
    axes.set_title("distance against L0, threshold by threshold", fontsize=9.5, loc="left")
    axes.set_xlabel("subcomponents used per token")


def _floats(values: pd.Series) -> pd.Series:
    return values.astype(float)


def _finish(axes: Any) -> None:
    axes.set_yscale("log")
    axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7.5, framealpha=0.8, edgecolor="none")
