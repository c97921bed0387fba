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
                "above target": f"{row['above_target']:+.3f}",
                "share of zero − target": f"{row['share_of_zero']:.1%}",
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
        return "Not measured yet on the decomposition that ships.\n"
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
    function.__name__: function for function in (model, modes, counts, attacks, ladder, controls, sites)
}


def of_report(report: Evaluation) -> Callable[[str], str]:
    """The tables of this page by name."""
    return lambda name: TABLES[name](report)


def main() -> None:
    fill(PAGE, of_report(bundled.evaluation()))


if __name__ == "__main__":
    main()
