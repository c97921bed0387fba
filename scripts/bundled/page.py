"""Writes the tables of docs/bundled.md from the files that ship: ``python -m scripts.bundled.page``.

A table stands between ``<!-- name -->`` and ``<!-- end -->``; a test compares the page with what this makes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from scripts.site.tables import fill, markdown
from tl_vpd import bundled
from tl_vpd.evaluation import Evaluation

ROOT = Path(__file__).parents[2]
PAGE, RESULTS = ROOT / "docs" / "bundled.md", ROOT / "benchmarks" / "results"
NOT_MEASURED = "Not measured yet on the decomposition that ships.\n"
OTHER_TEXT = {"scrambled": "the same, scrambled", "docs": "English prose (this documentation)"}


def _json(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def model(_: Evaluation) -> str:
    """What the model can do."""
    q = _json(bundled.MODEL / "quality.json")
    first, second = f"{q['name_first_nats']:.2f}", f"{q['name_second_nats']:.2f}"
    return markdown(
        [
            {"measure": "cross-entropy", "value": f"{q['validation_ce']:.3f} nats"},
            {
                "measure": "interpolated Kneser–Ney trigram of the same training text",
                "value": f"{q['trigram_ce']:.3f} nats",
            },
            {
                "measure": f"a name at its first / second occurrence in the window ({q['names']:,} names that recur)",
                "value": f"{first} / {second} nats",
            },
            {
                "measure": "the right one of `)`, `]`, `}` has the largest probability of the three where one closes "
                f"({q['brackets']} times)",
                "value": f"{q['bracket_accuracy']:.1%}",
            },
        ]
    )


def modes(report: Evaluation) -> str:
    """Cross-entropy and KL by mask mode."""
    rows = []
    for mode, row in report.table().iterrows():
        leak = row.get("leak", float("nan"))
        rows.append(
            {
                "masks": str(mode),
                "CE": f"{row['ce']:.3f}",
                "above target": f"{round(row['above_target'], 3) + 0.0:+.3f}",  # not -0.000
                "share of zero − target": f"{round(row['share_of_zero'], 3) + 0.0:.1%}",
                "leak": "" if pd.isna(leak) else f"{round(leak, 4) + 0.0:.4f}",
                "KL": f"{row['kl']:.3f}",
                "compute recovered": f"{row['compute_recovered']:.0%}",
            }
        )
    return markdown(rows)


def counts(report: Evaluation) -> str:
    """L0, alive and built subcomponents."""
    r = report.record
    return (
        f"L0 is **{r['l0']:.1f}** subcomponents per token: {r['l0'] / r['alive']:.1%} of {r['alive']:,} alive (mean importance"
        f" > 1e-6; {r['alive_1e-4']:,} above 1e-4), {r['l0'] / r['summed_rank']:.1%} of the {r['summed_rank']:,} summed ranks;"
        f" {r['built']:,} were built, and {r['alive'] / r['built']:.0%} of them are alive.\n"
    )


def attacks(report: Evaluation) -> str:
    """KL under the fresh adversary, by steps."""
    table = report.pgd_table()
    return markdown(
        [
            {
                "steps": str(steps),
                "KL, worst start": f"{row['kl']:.2f}",
                "starts": ", ".join(f"{kl:.2f}" for kl in row["starts"]),
            }
            for steps, row in table.iterrows()
        ]
    )


def decomposition_id() -> str:
    """Tells the decomposition that ships from an earlier one: the checksum of its evaluation."""
    return str(_json(bundled.MODEL.parent / "decomposition" / "metrics.json")["sha256"])


def ladder(_: Evaluation) -> str:
    """Attacks of ``python -m benchmarks.attacks``, where they are of the decomposition that ships."""
    record = _json(RESULTS / "attacks.json") if (RESULTS / "attacks.json").is_file() else {}
    if record.get("settings", {}).get("decomposition") != decomposition_id():
        return NOT_MEASURED
    rows = [
        {
            "adversary": attack["adversary"],
            "steps": str(attack["steps"]),
            "KL, worst start": f"{attack['kl']:.2f}",
            "interval": f"{attack['kl_low']:.2f}–{attack['kl_high']:.2f}",
            "starts": ", ".join(f"{kl:.2f}" for kl in attack["by_start"]),
        }
        for attack in record["attacks"].values()
    ]
    return markdown(rows) + f"\nAblating everything costs {record['zero']:.2f} nats on these rows.\n"


def full(report: Evaluation) -> Evaluation | None:
    """What ``tl-vpd eval bundled`` has written; None where it is of another decomposition than the one that ships."""
    path = RESULTS / "report.json"
    found = Evaluation.load(path) if path.is_file() else None
    return found if found is not None and found.record["l0"] == report.record["l0"] else None


def unions(report: Evaluation) -> str:
    """The union test."""
    if (found := full(report)) is None:
        return NOT_MEASURED
    rows = []
    for _, row in found.to_pandas("union_test").query("pieces == 'learned'").iterrows():
        rows.append(
            {
                "union over": f"{row['inputs']} inputs",
                "each input's set": _range(row, "kl_alone"),
                "their union": _range(row, "kl_union"),
                "added, paired": _range(row, "added"),
                "worse at": f"{row['worse']:.0%} of rows",
                "with random alive ones": f"{row['kl_random_partner']:.3f}",
            }
        )
    return markdown(rows)


def data(report: Evaluation) -> str:
    """Other text than it was trained on."""
    if (found := full(report)) is None:
        return NOT_MEASURED
    return markdown(
        [
            {
                "data": OTHER_TEXT.get(row["data"], row["data"]),
                "target CE": f"{row['target_ce']:.3f}",
                "L0": f"{row['l0']:.0f}",
                "rounded KL": _range(row, "rounded"),
                "share of zero": f"{row['share_of_zero']:.1%}",
                "union of pairs": f"{row['kl_union']:.3f}",
                "PGD-20": f"{row['pgd_kl']:.2f}",
                "random, rounded": f"{row['random']:.2f}",
            }
            for _, row in found.to_pandas("off_distribution").iterrows()
        ]
    )


def transfer(report: Evaluation) -> str:
    """Masks with errors propagating, on clean inputs and at single sites, and what is unexplained after each block."""
    if (found := full(report)) is None:
        return NOT_MEASURED
    learned = found.to_pandas("mask_transfer").query("pieces == 'learned'").set_index("replaced")
    single = learned[learned.index.str.startswith("single-site, blocks")]
    named = {"error-propagating": "all sites, errors propagate", "clean-input": "all sites, each on clean inputs"}
    rows = [{"masked": text, "KL": _range(learned.loc[name], "kl")} for name, text in named.items()]
    rows.append({"masked": "one site, mean", "KL": _range(learned.loc["single-site, mean"], "kl")})
    for which, name in (("least", single["kl"].idxmin()), ("most", single["kl"].idxmax())):
        text = f"one site, the {which}: `{name.removeprefix('single-site, ')}`"
        rows.append({"masked": text, "KL": _range(single.loc[name], "kl")})
    return markdown(rows)


def _range(row: Any, name: str) -> str:
    return f"{row[name]:.3f} ({row[f'{name}_low']:.3f} to {row[f'{name}_high']:.3f})"


def controls(report: Evaluation) -> str:
    """The learned pieces beside those of the controls."""
    rows = []
    for pieces, record in {"learned": report.record, **report.record["controls"]}.items():
        rows.append(
            {
                "pieces": pieces,
                "stochastic CE": f"{record['stochastic_ce']:.3f}",
                "rounded CE": f"{record['rounded_ce']:.3f}",
                "rounded KL": f"{record['kl']['rounded']:.2f}",
                "PGD-20 KL": f"{record['pgd_kl']['20']:.1f}",
            }
        )
    return markdown(rows)


def sites(report: Evaluation) -> str:
    """L0, alive and built by site."""
    return markdown(
        [
            {
                "site": f"`{site}`",
                "L0": f"{row['l0']:.1f}",
                "alive": str(int(row["alive"])),
                "built": str(int(row["built"])),
            }
            for site, row in report.sites_table().iterrows()
        ]
    )


TABLES: dict[str, Callable[[Evaluation], str]] = {
    function.__name__: function
    for function in (model, modes, counts, attacks, ladder, unions, data, transfer, controls, sites)
}


def of_report(report: Evaluation) -> Callable[[str], str]:
    """The tables of this page by name."""
    return lambda name: TABLES[name](report)


def main() -> None:
    fill(PAGE, of_report(bundled.evaluation()))


if __name__ == "__main__":
    main()
