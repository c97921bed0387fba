"""The curves of an evaluation's page: attacks by their steps, and distance against L0, beside the controls."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import pandas as pd

from tl_vpd.viz.series import Series, grid, legend, logarithmic, plot
from tl_vpd.viz.style import SERIES
from tl_vpd.viz.text import escape

PIECES = {
    "learned": Series(SERIES[0], "o"),
    "random": Series(SERIES[3], "X"),
    "singular": Series(SERIES[1], "P"),
    "shuffled": Series(SERIES[5], "D"),
    "untrained": Series(SERIES[2], "^"),
}
"""How each kind of pieces is drawn."""
ADVERSARIES = {
    "shared": PIECES["learned"],
    "shared, momentum": Series(SERIES[6], "s"),
    "position": Series(SERIES[4], "v"),
    "token": Series(SERIES[7], "D"),
    "span": Series("#1d2430", "."),
}
"""How each adversary of the learned pieces is drawn."""
ZERO = Series(SERIES[5], line=":")
OTHER = Series("#1d2430", ".", "--")


def curves(record: Mapping[str, Any]) -> str:
    """Plots of the curves that a record has (empty: none).

    Raises:
        ImportError: matplotlib is not installed.
    """
    tables, zero, pictures = record.get("tables", {}), record["kl"]["zero"], []
    if tables.get("adversaries"):
        attacks = pd.DataFrame(tables["adversaries"])
        learned, rest = (attacks[attacks["pieces"].eq("learned") == is_learned] for is_learned in (True, False))
        shown = {str(name): ADVERSARIES.get(str(name), OTHER) for name in learned["adversary"].unique()}
        for name in rest["pieces"].unique():
            control = PIECES.get(str(name), OTHER)
            shown[f"shared, {name} pieces"] = Series(control.colour, control.marker, "")
        named = attacks["adversary"].where(attacks["pieces"] == "learned", "shared, " + attacks["pieces"] + " pieces")
        rows = attacks.assign(name=named, x=attacks["steps"])
        pictures.append(_picture("Distance under attack", rows, shown, "steps of the attack (steps × size = 2)", zero))
    if tables.get("sparsity_sweep"):
        sweep = pd.DataFrame(tables["sparsity_sweep"])
        shown = {str(name): PIECES.get(str(name), OTHER) for name in sweep["pieces"].unique()}
        rows = sweep.assign(name=sweep["pieces"], x=sweep["l0"])
        x_label = "subcomponents used per token (L0)"
        pictures.append(_picture("Distance against L0, threshold by threshold", rows, shown, x_label, zero))
    return grid(pictures) if pictures else ""


def _picture(title: str, rows: pd.DataFrame, shown: dict[str, Series], x_label: str, zero: float | None) -> str:
    """A heading, a plot and its legend, of the column ``kl`` over ``x``, a line for each ``name``."""
    draw = partial(_draw, rows=rows, shown=shown, x_label=x_label, zero=zero)
    if zero is not None:
        shown = {**shown, "everything ablated": ZERO}
    return f"<h4>{escape(title)}</h4>{plot(draw, (4.2, 3.2))}{legend(shown)}"


def _draw(axes: Any, rows: pd.DataFrame, shown: Mapping[str, Series], x_label: str, zero: float | None) -> None:
    for name, one in shown.items():
        group = rows[rows["name"] == name]
        axes.plot(group["x"], group["kl"].astype(float), **one.options, label=name)
        if {"kl_low", "kl_high"} <= set(group) and one.line:
            low, high = group["kl_low"].astype(float), group["kl_high"].astype(float)
            axes.fill_between(group["x"], low, high, color=one.colour, alpha=0.15)
    if zero is not None:
        axes.axhline(zero, color=ZERO.colour, linestyle=ZERO.line, linewidth=1.3)
    axes.set(xlabel=x_label, ylabel="KL to the target (nats per token)")
    logarithmic(axes, "y")
