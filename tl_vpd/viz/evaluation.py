"""An evaluation as one page: what is wrong, the numbers, and curves beside their controls."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from tl_vpd.checks import instance
from tl_vpd.evaluation import Evaluation
from tl_vpd.viz.evaluation_curves import curves
from tl_vpd.viz.panel import Panel, page
from tl_vpd.viz.tables import table
from tl_vpd.viz.text import escape, number

INTRODUCTION = (
    "Distances are KL(target ‖ masked) in nats per token (mean squared errors for models without logits). Ranges are 95% "
    "percentile bootstrap intervals over rows of tokens; below about twenty rows they are too narrow.\n\n"
    "Judge by the KL: a bidirectional Γ reads the whole window, the next token included, and masks carry some of that into the "
    "cross-entropy, which may even fall below the target's. The column leak shows how much; with a causal Γ it is 0.\n\n"
    "Controls give the same importances to other pieces: random gives them to random alive subcomponents of the same site, "
    "singular to singular directions of the weight, shuffled to other tokens, untrained to those that an untrained Γ ranks "
    "highest."
)
TABLES: dict[str, tuple[str, str]] = {
    "adversaries": (
        "Adversaries and their budgets",
        "Each chooses the masks of what is unimportant to do the most harm: one choice for all tokens (shared), for every "
        "position, or for every token, which fits noise; span may only add what other tokens need, in any mixture. The "
        "interval is over rows, under the worst sources.",
    ),
    "union_test": (
        "Union test: what two inputs need, on for both",
        "Each input's KL with its important set, and with the union over a group of inputs; random partner adds random "
        "alive subcomponents, as many. Where explanations are true together, the union costs little.",
    ),
    "off_distribution": (
        "Other data, side by side",
        "Rounded masks where no other mode is named; share of zero relates the distance to that of ablating everything on the "
        "same rows. Scrambled rows consist of the same tokens in another order.",
    ),
    "nontarget": (
        "Other data, with Δ on",
        "What a targeted decomposition leaves as it is: the distance per token under stochastic and rounded masks of its "
        "subcomponents, and with all of them ablated, which is what taking them out of the model does.",
    ),
    "mask_transfer": (
        "Mask transfer: replaced together, on clean inputs, one at a time",
        "Rounded masks. Clean-input: every attention layer and MLP reads the target's residual stream.",
    ),
    "hidden": (
        "Hidden activations and attention patterns",
        "Share of variance over tokens that the masked model leaves unexplained, of each site's output and of the residual "
        "stream; of patterns the KL. A site's output may be far off in directions that nothing reads.",
    ),
    "sparsity_sweep": ("Sparsity sweep: distance against L0", "A token uses what is important above the threshold."),
    "feature_splitting": ("Feature splitting: alive counts by the number built", "Growth near 1: nothing was split."),
    "consistency": ("Consistency with other decompositions", "Mean max cosines both ways, beside random directions."),
    "cancelling": ("Subcomponents that point against each other", "Cosine of rank-one matrices below −0.9."),
    "future_leakage": (
        "Future leakage: what Γ's view of the future contributes",
        "Importances from the whole window, and from the prefix alone. Leak: how much more cross-entropy the prefix alone costs.",
    ),
    "nulls": (
        "Nulls: decompositions of models that have learned nothing",
        "Rounded masks; share of zero relates the distance to that of ablating everything in the same model.",
    ),
}
"""Table -> (caption, note), in the order of the page."""


def evaluation_page(report: Evaluation, path: str | os.PathLike[str], *, title: str = "Evaluation") -> Path:
    """Writes the page of an evaluation, which opens offline; returns the path.

    Args:
        report: from ``evaluate``.
        path: of the page.
        title: of the page.

    Raises:
        TypeError: the report is something else.
    """
    instance("report", report, Evaluation)
    return page(panels(report), title, path, introduction=INTRODUCTION)


def panels(report: Evaluation) -> list[Panel]:
    """The panels of an evaluation's page."""
    record = report.record
    result = [_verdict(report), table(report.table(), "Mask modes", note=_counts(record))]
    if plots := curves(record):
        result.append(Panel(title="Curves", body=f"<h3>Curves</h3>{plots}"))
    tables = record.get("tables", {})
    for name, (caption, note) in TABLES.items():
        if tables.get(name):
            rows = pd.DataFrame(tables[name])
            result.append(table(_side_by_side(rows) if name == "hidden" else with_ranges(rows), caption, note=note))
    if record["pgd_kl"]:
        attacks = report.pgd_table().reset_index().rename(columns={"low": "kl_low", "high": "kl_high"})
        attacks["starts"] = [
            ", ".join("–" if v is None else f"{v:.3g}" for v in starts) for starts in attacks["starts"]
        ]
        result.append(table(with_ranges(attacks), "The standard adversary", note=_attacked(record)))
    result.append(table(report.sites_table().rename_axis("site"), "Sites"))
    return result


def _verdict(report: Evaluation) -> Panel:
    checks = report.checks()
    rows = "".join(
        f"<tr><td>{escape(str(name))}</td><td class=words>{_outcome(check)}</td>"
        f'<td class="words sentence">{escape(str(check.sentence))}</td></tr>'
        for name, check in zip(checks.index, checks.itertuples(index=False), strict=True)
    )
    n = int(checks["fault"].sum())
    head = "No known fault" if not n else f"{n} known {'fault' if n == 1 else 'faults'}"
    reasons = report.record.get("left_out", {}).items()
    left_out = "".join(
        f'<p class="note">{_missing(name)}: {escape(name)}, as {escape(why)}.</p>' for name, why in reasons
    )
    note = "Limits are conventions (docs/evaluation.md); that no fault is known does not make a decomposition right."
    body = f'<h3>{head}</h3><p class="note">{note}</p><div class="wide"><table>{rows}</table></div>{left_out}'
    return Panel(title="Verdict", body=body)


def _missing(name: str) -> str:
    """What is said of a name in ``left_out``: a measure, rows of data, or a figure (a dash in the tables)."""
    return "Left out" if name in TABLES or name == "rows" else "Not defined (– in the tables)"


def _outcome(check: Any) -> str:
    if pd.isna(check.value):
        return "not measured"
    word = "fault" if check.fault else "passed"
    return f'<b class="{word}">{word}</b>'


def _counts(record: Mapping[str, Any]) -> str:
    target = f"Target cross-entropy {record['target_ce']:.4f}. " if record.get("target_ce") is not None else ""
    l0 = "not defined"
    if record["l0"] is not None:
        l0 = f"{record['l0']:.1f} per token, {record['l0'] / max(record['alive'], 1):.1%} of {record['alive']} alive"
    return (
        f"{target}L0 {l0}; {record['built']} built, "
        f"{record['summed_rank']} summed ranks; {record['tokens']:,} tokens. Δ is 0, but random in the stochastic mode. Partial "
        "uses a random half of what is unimportant."
    )


def _attacked(record: Mapping[str, Any]) -> str:
    tokens = record.get("pgd_tokens", record["tokens"])
    return f"Sources shared over {tokens:,} tokens, Δ's included; steps × size = 2; the worst start counts."


def _side_by_side(df: pd.DataFrame) -> pd.DataFrame:
    """One row for each point inside the model, the kinds of pieces side by side."""
    wide = df.pivot_table(index=["what", "kind"], columns="pieces", values="error", sort=False, dropna=False)
    return wide.dropna(how="all").reset_index().rename_axis(columns=None)


def with_ranges(df: pd.DataFrame) -> pd.DataFrame:
    """Low and high as one column, each measure beside its range; the kind of pieces only where there are several."""
    if "pieces" in df and df["pieces"].nunique() == 1:
        df = df.drop(columns="pieces")
    columns: dict[str, Any] = {}
    for name in df.columns:
        base = name.removesuffix("_low").removesuffix("_high")
        if base == name:
            columns[name] = ["" if pd.isna(v) else v for v in df[name]] if df[name].isna().any() else df[name]
        elif name.endswith("_low"):
            pairs = zip(df[name], df[f"{base}_high"], strict=True)
            columns[f"{base} 95%"] = ["" if pd.isna(a) else f"{number(a)} – {number(b)}" for a, b in pairs]
    return pd.DataFrame(columns)
