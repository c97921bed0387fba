"""A comparison as one page: cost in active pieces against cross-entropy, the ways of replacing, and the table."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from tl_vpd.baselines.comparison import Comparison
from tl_vpd.baselines.comparison.config import WAYS
from tl_vpd.checks import instance
from tl_vpd.viz.evaluation import with_ranges
from tl_vpd.viz.panel import Panel, page
from tl_vpd.viz.series import Series, legend, logarithmic, plots, series
from tl_vpd.viz.style import SERIES
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
PLOTS = {
    "per_module": ("active pieces per module and token", "ce_increase"),
    "per_mlp": ("active pieces per MLP output and token", "ce_increase"),
    "parameters": ("active parameters per token", "ce_increase"),
    "built": ("built pieces", "alive"),
}
"""Columns of the table of methods, what they are, and the column that is drawn over them."""
COUNTS = (
    *("built", "alive", "dead", "l0", "per_module", "per_mlp", "parameters", "index_bits", "entropy_bits"),
    *("flops", "seconds"),
)
LABELS = ["artefact", "threshold"]
SEEDS = "The mean of the artefacts of a method and size; ranges are from the smallest to the largest. alive_growth: alive \
count over that of the smallest size. V, U, rank_one: mean max cosine of the artefacts' alive pieces, beside random ones."
ATTACK = (
    "A shared adversary switches inactive pieces on: subcomponents and Δ by their masks, latents by a share of what ReLU \
passes below their thresholds."
)


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
    summary, methods, attacks = (comparison.to_pandas(name) for name in ("summary", "methods", "attacks"))
    note = (
        f"Target cross-entropy {comparison.target_ce:.4f}; with every MLP output 0 it is {comparison.zero['ce_increase']:.3g} "
        f"more (KL {comparison.zero['kl']:.3g}). {comparison.tokens:,} tokens, layers {list(comparison.layers)}."
    )
    shown = series(methods["method"])
    bars = {way: Series(SERIES[i], "s", "") for i, way in enumerate(WAYS)}
    costs = plots([partial(_plot, methods=methods, shown=shown, x=x) for x in PLOTS], (4.2, 3.0))
    ways = plots([partial(_ways, methods=methods, colours=[one.colour for one in bars.values()])], _ways_size(methods))
    others = [c for c in summary if c not in (*COUNTS, "kind", "method", "trained_in", "l0_low", "l0_high")]
    result = [
        _of_plots("Cost, fit and splitting", legend(shown) + costs),
        _of_plots("Ways of replacing", legend(bars) + ways),
        table(_shown(_of_seeds(methods)), "Methods", note=SEEDS),
        table(_shown(summary[[*LABELS, "kind", "trained_in", *COUNTS]]), "Counts, bits and training", note=note),
        table(_shown(with_ranges(summary[others])), "KL and rise of the cross-entropy"),
        table(_shown(comparison.to_pandas("modules")), "Modules"),
    ]
    return [*result, table(_shown(with_ranges(attacks)), "Under attack", note=ATTACK)] if len(attacks) else result


def _of_plots(title: str, body: str) -> Panel:
    return Panel(title=title, body=f"<h3>{title}</h3>{body}")


def _plot(at: Any, methods: pd.DataFrame, shown: Mapping[str, Series], x: str) -> None:
    """A curve over sizes for each method and threshold, with the range over seeds."""
    name, y = PLOTS[x]
    for (method, _), group in methods.groupby(["method", "threshold"], sort=False, dropna=False):
        low, mean, high = (group[f"{y}{end}"].astype(float) for end in ("_low", "", "_high"))
        at.errorbar(group[x], mean, yerr=[mean - low, high - mean], **shown[str(method)].options)
    at.set_xlabel(name)
    at.set_ylabel("alive pieces" if y == "alive" else "rise of the cross-entropy (nats)")
    logarithmic(at, "x")


def _ways_size(methods: pd.DataFrame) -> tuple[float, float]:
    return 4.6, 0.6 + 0.36 * len(methods)


def _ways(at: Any, methods: pd.DataFrame, colours: Sequence[str]) -> None:
    """Three bars for each row of the table of methods."""
    columns = ["kl", "clean_input_kl", "single_layer_kl"]
    for i, (colour, column) in enumerate(zip(colours, columns, strict=True)):
        low, mean, high = (methods[f"{column}{end}"] for end in ("_low", "", "_high"))
        places = [row + 0.27 * (i - 1) for row in range(len(methods))]
        error = {"xerr": [mean - low, high - mean], "error_kw": {"linewidth": 0.8}}
        at.barh(places, mean, height=0.25, color=colour, **error)
    at.set_yticks(range(len(methods)), [_name(row) for row in methods.itertuples()])
    at.invert_yaxis()
    at.set_xlabel("KL to the target (nats per token)")
    at.margins(y=0.01)
    if bool((methods[columns] > 0).all(axis=None)):
        logarithmic(at, "x")


def _of_seeds(methods: pd.DataFrame) -> pd.DataFrame:
    """The table of methods, with ranges of the figures that seeds are compared by."""
    ranged = ("alive", "kl", "clean_input_kl", "single_layer_kl")
    names = [
        name
        for name in methods.columns.astype(str)
        if not name.endswith(("_low", "_high")) or name.startswith(("pgd_", *ranged))
    ]
    return with_ranges(methods[names]).rename(columns=lambda name: name.replace(" 95%", " range"))


def _name(row: Any) -> str:
    name = f"{row.method}, {row.built:,} built"
    return name if pd.isna(row.threshold) else f"{name}, g > {row.threshold:g}"


def _shown(df: pd.DataFrame) -> pd.DataFrame:
    """The table with a dash for what is not defined, and without columns that are not defined anywhere."""
    df = df.dropna(axis=1, how="all")
    return df.assign(
        **{
            name: df[name].astype(object).where(df[name].notna(), "–")
            for name in df.columns.astype(str)
            if df[name].isna().any()
        }
    )
