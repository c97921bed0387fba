"""An evaluation as one page: what is wrong, the numbers, and curves beside their controls."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from tl_vpd.evaluation import Evaluation
from tl_vpd.viz.panel import Panel, page
from tl_vpd.viz.svg import svg
from tl_vpd.viz.tables import table
from tl_vpd.viz.text import escape

COLOURS = {"learned": "#1f5fd0", "random": "#c2185b", "singular": "#e07b00", "shuffled": "#6b7484"}
"""Colour of each kind of pieces in the curves."""

INTRODUCTION = (
    "Distances are KL(target ‖ masked) in nats a token (mean squared errors for models without logits). Ranges are 95% "
    "percentile bootstrap intervals over rows of tokens; below about twenty rows they are too narrow.\n\n"
    "Judge by the KL: Γ reads the whole window, the next token included, and masks carry some of that into the "
    "cross-entropy, which may even fall below the target's. The table of foresight shows how much.\n\n"
    "Controls get the same importances in other hands: random gives them to random living subcomponents of the same site, "
    "singular to singular directions of the weight, shuffled to other tokens."
)
TABLES: dict[str, tuple[str, str]] = {
    "adversaries": (
        "Adversaries and their budgets",
        "Each chooses the masks of what is unimportant to do the most harm: one choice for all tokens (shared), for every "
        "position, or for every token, which fits noise; span may only add what other tokens need, in any mixture. The "
        "interval is over rows, under the worst sources found.",
    ),
    "aggregation": (
        "Aggregation: what two inputs need, kept for both",
        "Each input's KL with its own important set, and with the union over a group of inputs; random partner adds random "
        "living subcomponents, as many. Where explanations are true together, the union costs little.",
    ),
    "slices": (
        "Other text and slices, side by side",
        "Rounded masks unless said otherwise; share of zero relates the distance to that of ablating everything on the same "
        "rows. Scrambled rows hold the same tokens in another order.",
    ),
    "transfer": (
        "Transfer: replaced together, on clean inputs, one at a time",
        "Rounded masks. Clean-input: every attention layer and MLP reads the target's own residual stream.",
    ),
    "hidden": (
        "Hidden activations and attention patterns",
        "Share of variance over tokens that the masked model leaves unexplained, of each site's output and of the residual "
        "stream; of patterns the KL. A site's output may be far off in directions that nothing reads.",
    ),
    "resolution": ("Variable resolution: distance against L0", "A token keeps what is important above the threshold."),
    "sizes": ("Splitting: alive counts by the number built", "Flat growth near 1 is what is hoped for."),
    "consistency": ("Consistency with other decompositions", "Mean max cosines both ways, beside random directions."),
    "cancelling": ("Subcomponents that point against each other", "Cosine of rank-one matrices below −0.9."),
    "foresight": (
        "What Γ owes to seeing the future",
        "Rounded masks with importances from the whole window, and from the prefix alone.",
    ),
}
"""Table -> (caption, note), in the order of the page."""


def evaluation_page(report: Evaluation, path: str | os.PathLike[str], *, title: str) -> Path:
    """Writes the page of an evaluation, which opens offline; returns the path."""
    return page(panels(report), title, path, introduction=INTRODUCTION)


def panels(report: Evaluation) -> list[Panel]:
    """The panels of an evaluation's page."""
    own = report.record
    found = [_verdict(report), table(report.table(), "Mask modes", note=_counts(own))]
    curves = _curves(own)
    if curves:
        found.append(Panel(title="Curves", body=f'<h3>Curves</h3><div class="plot">{curves}</div>'))
    tables = own.get("tables", {})
    for name, (caption, note) in TABLES.items():
        if tables.get(name):
            rows = pd.DataFrame(tables[name])
            shown = _beside(rows) if name == "hidden" else _shown(rows)
            found.append(table(shown, caption, note=note))
    if own["pgd_kl"]:
        starts = pd.DataFrame(
            {"steps": list(own["pgd_kl"]), "kl": list(own["pgd_kl"].values())}
            | {"starts": [", ".join(f"{v:.3g}" for v in own["pgd_kl_starts"][k]) for k in own["pgd_kl"]]}
        )
        found.append(table(starts, "The standard adversary", note=_attacked(own)))
    found.append(table(report.sites_table().rename_axis("site"), "Sites"))
    return found


def _verdict(report: Evaluation) -> Panel:
    checks = report.checks()
    rows = "".join(
        f"<tr><td>{escape(str(name))}</td><td class=words><b style='color:{_colour(check.fault)}'>"
        f"{'fault' if check.fault else 'passed'}</b></td>"
        f"<td class=words style='white-space:normal'>{escape(str(check.sentence))}</td></tr>"
        for name, check in zip(checks.index, checks.itertuples(index=False), strict=True)
    )
    n = int(checks["fault"].sum())
    head = "No known fault was found" if not n else f"{n} known {'fault' if n == 1 else 'faults'} found"
    left_out = "".join(
        f'<p class="note">Left out: {escape(k)}, as {escape(v)}.</p>'
        for k, v in report.record.get("left_out", {}).items()
    )
    note = "Limits are conventions (docs/evaluation.md); that no fault was found does not make a decomposition right."
    body = f'<h3>{head}</h3><p class="note">{note}</p><div class="wide"><table>{rows}</table></div>{left_out}'
    return Panel(title="Verdict", body=body)


def _colour(fault: Any) -> str:
    return "#c2185b" if fault else "#2e7d32"


def _counts(own: Mapping[str, Any]) -> str:
    target = f"Target cross-entropy {own['target_ce']:.4f}. " if "target_ce" in own else ""
    share = own["l0"] / own["alive"] if own["alive"] else 0.0
    return (
        f"{target}L0 {own['l0']:.1f} a token, {share:.1%} of {own['alive']} alive; {own['built']} built, "
        f"{own['summed_rank']} summed ranks; {own['tokens']:,} tokens. Δ is 0, but drawn in the stochastic mode. Partial keeps a "
        "random half of what is unimportant."
    )


def _attacked(own: Mapping[str, Any]) -> str:
    tokens = own.get("pgd_tokens", own["tokens"])
    return f"Sources shared over {tokens:,} tokens, Δ's included; steps × size = 2; the worst start counts."


def _beside(df: pd.DataFrame) -> pd.DataFrame:
    """One row a place inside the model, the kinds of pieces side by side."""
    wide = df.pivot_table(index=["what", "kind"], columns="pieces", values="error", sort=False, dropna=False)
    return wide.dropna(how="all").reset_index().rename_axis(columns=None)


def _shown(df: pd.DataFrame) -> pd.DataFrame:
    """Low and high as one column, each measure and its range side by side; the kind of pieces only where there are several."""
    if "pieces" in df and df["pieces"].nunique() == 1:
        df = df.drop(columns="pieces")
    columns: dict[str, Any] = {}
    for name in df.columns:
        base = name.removesuffix("_low").removesuffix("_high")
        if base == name:
            columns[name] = ["" if pd.isna(v) else v for v in df[name]] if df[name].isna().any() else df[name]
        elif name.endswith("_low"):
            pairs = zip(df[name], df[f"{base}_high"], strict=True)
            columns[f"{base} 95%"] = ["" if pd.isna(a) else f"{a:.3g} – {b:.3g}" for a, b in pairs]
    return pd.DataFrame(columns)


def _curves(own: Mapping[str, Any]) -> str:
    tables = own.get("tables", {})
    attacks = pd.DataFrame(tables.get("adversaries", []))
    resolution = pd.DataFrame(tables.get("resolution", []))
    if not len(attacks) and not len(resolution):
        return ""
    drawn = [draw for draw, shown in ((_draw_attacks, len(attacks)), (_draw_resolution, len(resolution))) if shown]

    def draw_all(figure: Any) -> None:
        for draw, axes in zip(drawn, figure.subplots(1, len(drawn), squeeze=False)[0], strict=True):
            draw(axes, attacks if draw is _draw_attacks else resolution, own["kl"]["zero"])

    return svg((5.2 * len(drawn), 3.6), draw_all)


def _draw_attacks(axes: Any, attacks: pd.DataFrame, zero: float) -> None:
    for name, group in attacks[attacks["pieces"] == "learned"].groupby("adversary", sort=False):
        axes.plot(group["steps"], group["kl"], marker="o", markersize=4, linewidth=1.3, label=str(name))
    for name, group in attacks[attacks["pieces"] != "learned"].groupby("pieces", sort=False):
        axes.plot(group["steps"], group["kl"], "x", color=COLOURS.get(str(name)), label=f"shared, {name} pieces")
    axes.axhline(zero, color="#6b7484", linestyle=":", linewidth=1, label="everything ablated")
    _finish(axes, "distance under attack, by steps", "steps (steps × size = 2)")


def _draw_resolution(axes: Any, resolution: pd.DataFrame, zero: float) -> None:
    for name, group in resolution.groupby("pieces", sort=False):
        colour = COLOURS.get(str(name))
        axes.plot(group["l0"], group["kl"], marker=".", linewidth=1.3, color=colour, label=str(name))
        axes.fill_between(group["l0"], _floats(group["kl_low"]), _floats(group["kl_high"]), color=colour, alpha=0.15)
    axes.axhline(zero, color="#6b7484", linestyle=":", linewidth=1, label="everything ablated")
    _finish(axes, "distance against L0, threshold by threshold", "subcomponents kept a token")


def _floats(values: pd.Series) -> pd.Series:
    return values.astype(float)


def _finish(axes: Any, title: str, label: str) -> None:
    axes.set_title(title, fontsize=9.5, loc="left")
    axes.set_xlabel(label)
    axes.set_yscale("log")
    axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7.5, framealpha=0.8, edgecolor="none")
