"""The tables of docs/auditing.md and docs/comparison.md, as texts by row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scripts.site.tables import Rows

AUDITS = {
    "corrupted": "published",
    "stochastic": "stochastic",
    "adversarial_20": "adversary, 20 steps",
    "adversarial_per_position": "and for each position",
    "adversarial_from_zero": "adversary, from zero",
}
"""Ablations of an audit, and their columns."""
METHODS = {
    "bundled": "bundled VPD",
    "vpd": "VPD",
    "plt": "PLT, local",
    "clt": "CLT, local",
    "plt, cascading": "PLT, cascading",
    "plt, parallel": "PLT, parallel",
    "plt, independent": "PLT, independent",
    "clt, cascading": "CLT, cascading",
    "clt, parallel": "CLT, parallel",
    "clt, independent": "CLT, independent",
}
"""Methods of a comparison, and their names on the page."""
MEANS = {
    "alive": "alive",
    "l0": "active per token",
    "parameters": "active parameters",
    "index_bits": "bits",
    "kl": "KL, errors propagate",
    "clean_input_kl": "clean inputs",
    "single_layer_kl": "one layer",
}
"""Figures of a comparison's methods, and their columns."""


def audits(record: Mapping[str, Any]) -> Rows:
    """Each task's EAP-IG circuit, on the pairs that did not choose it."""
    rows = []
    for task, entry in record.items():
        if task == "settings":
            continue
        circuit, repair = entry["eap_ig"], entry["eap_ig"]["repair"]
        rows.append(
            {
                "task": "induction (toy)" if task == "induction" else task.replace("_", " "),
                "edges": f"{circuit['edges']} of {circuit['of']}",
                **{column: _rounded(circuit["recovered"][name]) for name, column in AUDITS.items()},
                "random circuit, 5 steps": _rounded(circuit["random"]["adversarial_5"]),
                "added by repair": f"{repair['added']}{'' if repair['holds'] else ' (does not hold)'}",
                "then, 20 steps": _rounded(repair["adversarial_20"]),
            }
        )
    return rows


def comparison(record: Mapping[str, Any]) -> Rows:
    """Each method's artefacts of one size: means, and the range over seeds where there are several."""
    attack = f"pgd_{record['settings']['budgets'][-1]}"
    means = {**MEANS, attack: "attacked", "seconds": "CPU seconds"}
    rows = []
    for method, name in METHODS.items():
        for row in record["comparison"]["methods"]:
            if row["method"] != method:
                continue
            cosine = "" if row["U"] is None else f"{row['U']:.2f} ({row['U_random']:.2f})"
            rows.append(
                {
                    "method": name if row["threshold"] is None else f"{name}, g > {row['threshold']:g}",
                    "built": f"{row['built']:,}",
                    "seeds": str(row["artefacts"]),
                    **{column: _spread(row, figure) for figure, column in means.items()},
                    "seeds' cosine (random)": cosine,
                }
            )
    return rows


def _rounded(figure: float) -> str:
    return f"{round(figure, 2) + 0.0:.2f}"  # not -0.00


def _spread(row: Mapping[str, Any], name: str) -> str:
    """A mean, with the smallest and the largest value where they differ (empty: not known)."""
    if row[name] is None:
        return ""
    form = ",.0f" if row[name] >= 100 else ".3g"
    mean, low, high = (format(row[f"{name}{end}"], form) for end in ("", "_low", "_high"))
    return mean if low == high else f"{mean} ({low}–{high})"
