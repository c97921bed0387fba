"""A comparison as one page: cost in active pieces against cross-entropy, the ways of replacing, and the table."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pandas as pd

from tl_vpd.baselines.comparison import Comparison
from tl_vpd.baselines.comparison.config import WAYS
from tl_vpd.checks import instance
from tl_vpd.viz.evaluation import with_ranges
from tl_vpd.viz.panel import Panel, page
from tl_vpd.viz.svg import svg
from tl_vpd.viz.tables import table

INTRODUCTION = (
    "Every artefact takes the place of the same MLPs. The cross-entropy of the next token rises over the target's by so many "
    "nats per token; ranges are 95% percentile bootstrap intervals over rows.\n\n"
    "Error-propagating: each replaced MLP reads the residual stream as the ones before it left it. Clean-input: each reads the "
    "target's. Single-layer: one MLP at a time, averaged. What was trained in one way and falls apart in another makes up for "
    "the errors of that way.\n\n"
    "A latent and a subcomponent are not the same kind of thing: read all three axes of cost, and the bits, before you name a "
    "winner."
)
AXES = {
    "per_module": "active pieces per module",
    "per_mlp": "active pieces per MLP output",
    "parameters": "active parameters",
}
COLOURS = {
    "parameter decomposition": "#7b2fb5",
    "per-layer transcoders": "#1f5fd0",
    "cross-layer transcoders": "#e07b00",
    "SAEs of MLP outputs": "#2e8b57",
}
FEWER = ["artefact", "threshold", "kind"]


def comparison_page(comparison: Comparison, path: str | os.PathLike[str], *, title: str = "Comparison") -> Path:
    """Writes the page of a comparison, which opens offline; returns the path.

    Args:
        comparison: from ``tl_vpd.baselines.compare``.
        path: of the page.
        title: of the page.

    Raises:
        TypeError: the comparison is something else.
    """
    instance("comparison", comparison, Comparison)
    return page(comparison_panels(comparison), title, path, introduction=INTRODUCTION)


def comparison_panels(comparison: Comparison) -> list[Panel]:
    """The panels of a comparison's page."""
    instance("comparison", comparison, Comparison)
    summary = comparison.to_pandas()
    note = (
        f"Target cross-entropy {comparison.target_ce:.4f}; with every MLP output 0 it is {comparison.zero['ce_increase']:.3g} "
        f"more (KL {comparison.zero['kl']:.3g}). {comparison.tokens:,} tokens, layers {list(comparison.layers)}."
    )
    plots = svg((12.6, 3.8), lambda figure: _costs(figure, summary, comparison.zero["ce_increase"]))
    ways = svg((10.4, 3.8), lambda figure: _ways(figure, summary))
    counts = ["built", "alive", "dead", "l0", "per_module", "per_mlp", "parameters", "index_bits", "entropy_bits"]
    figures = [c for c in summary.columns if c not in (*FEWER, *counts, "l0_low", "l0_high", "flops", "seconds")]
    result = [
        Panel(title="Cost and fit", body=f'<h3>Cost and fit</h3><div class="plot">{plots}</div>'),
        Panel(title="Ways of replacing", body=f'<h3>Ways of replacing</h3><div class="plot">{ways}</div>'),
        table(_shown(summary[[*FEWER, *counts, "flops", "seconds"]]), "Counts, bits and training", note=note),
        table(_shown(with_ranges(summary[[*FEWER[:2], *figures]])), "KL and rise of the cross-entropy"),
        table(_shown(comparison.to_pandas("modules")), "Modules"),
    ]
    attacks = comparison.to_pandas("attacks")
    if len(attacks):
        what = (
            "A shared adversary switches inactive pieces on: subcomponents and Δ by their masks, latents by a share of what ReLU "
            "passes below their thresholds."
        )
        result.append(table(_shown(with_ranges(attacks)), "Under attack", note=what))
    return result


def _costs(figure: Any, summary: pd.DataFrame, zero: float) -> None:
    axes = figure.subplots(1, len(AXES))
    for at, (column, name) in zip(axes, AXES.items(), strict=True):
        for kind, group in summary.groupby("kind", sort=False):
            low, y, high = (group[f"ce_increase{end}"].astype(float) for end in ("_low", "", "_high"))
            errors = [(y - low).clip(lower=0), (high - y).clip(lower=0)]
            at.errorbar(group[column], y, yerr=errors, fmt="o", color=COLOURS[str(kind)], label=str(kind), markersize=4)
        at.axhline(zero, color="#6b7484", linestyle=":", linewidth=1, label="MLP outputs 0")
        at.set_xlabel(f"{name} per token")
        at.set_xscale("log")
        at.grid(alpha=0.25, linewidth=0.6)
        at.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("rise of the cross-entropy (nats)")
    axes[0].legend(fontsize=7.5, framealpha=0.8, edgecolor="none")


def _ways(figure: Any, summary: pd.DataFrame) -> None:
    at = figure.subplots()
    columns = ["kl", "clean_input_kl", "single_layer_kl"]
    for i, (way, column) in enumerate(zip(WAYS, columns, strict=True)):
        at.bar([x + 0.27 * (i - 1) for x in range(len(summary))], summary[column], width=0.25, label=way)
    at.set_xticks(range(len(summary)), [_name(row) for row in summary.itertuples()], rotation=20, ha="right")
    at.set_ylabel("KL to the target (nats per token)")
    at.set_yscale("log" if bool((summary[columns] > 0).all(axis=None)) else "linear")
    at.spines[["top", "right"]].set_visible(False)
    at.legend(fontsize=7.5, framealpha=0.8, edgecolor="none")


def _name(row: Any) -> str:
    return str(row.artefact) if pd.isna(row.threshold) else f"{row.artefact}, g > {row.threshold:g}"


def _shown(df: pd.DataFrame) -> pd.DataFrame:
    """The table with a dash for what is not defined, and without columns that are not defined anywhere."""
    df = df.dropna(axis=1, how="all")
    return df.astype(object).where(df.notna(), "–")
