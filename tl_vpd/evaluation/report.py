"""``Evaluation``: the report as one JSON record, its tables, what is wrong by it, and a page.

>>> from tl_vpd import bundled
>>> report = bundled.evaluation()
>>> float(report.table().loc["zero", "share_of_zero"])
1.0
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from tl_vpd.components.storage import write_json
from tl_vpd.evaluation.modes import ROWS
from tl_vpd.evaluation.verdict import checks, warnings_of
from tl_vpd.site import nearest


@dataclass(frozen=True)
class Evaluation:
    """The flat record of an evaluation; ``controls`` holds records of the same form, ``tables`` the rows of all tables."""

    record: dict[str, Any]

    @property
    def warnings(self) -> list[str]:
        """What is wrong with the decomposition by this evaluation, one sentence each (none: no check failed)."""
        return warnings_of(self.record)

    def checks(self) -> pd.DataFrame:
        """Every check that the record allows: what was measured, the limit, whether it is a fault, and a sentence."""
        return pd.DataFrame([vars(check) for check in checks(self.record)]).set_index("check")

    def table(self) -> pd.DataFrame:
        """One row a mask mode: CE, CE above the target, its share of (zero − target), KL (MSE) with its interval, compute
        recovered; with controls, their KL."""
        own = self.record
        rows = []
        for name in (row for row in ROWS if row in own["kl"]):
            row: dict[str, Any] = {"mode": name}
            if "target_ce" in own:
                above = own[f"{name}_ce"] - own["target_ce"]
                span = own["zero_ce"] - own["target_ce"]
                row |= {"ce": own[f"{name}_ce"], "above_target": above, "share_of_zero": above / span}
            row[own.get("output", "kl")] = own["kl"][name]
            if (bounds := own.get("intervals", {}).get("kl", {}).get(name)) is not None:
                row["low"], row["high"] = bounds
            if own["compute_recovered"]:
                row["compute_recovered"] = own["compute_recovered"][name]
            row |= {
                f"{pieces} pieces": c["kl"][name] for pieces, c in own.get("controls", {}).items() if name in c["kl"]
            }
            rows.append(row)
        return pd.DataFrame(rows).set_index("mode")

    def pgd_table(self) -> pd.DataFrame:
        """KL under the fresh adversary by number of steps (steps × size = 2)."""
        curve = self.record["pgd_kl"]
        return pd.DataFrame({"steps": [int(k) for k in curve], "kl": list(curve.values())}).set_index("steps")

    def sites_table(self) -> pd.DataFrame:
        """L0 a token, alive and built subcomponents by site, and Δ's share of the weight's square."""
        own = self.record
        columns = {"l0": own["l0_by_site"], "alive": own["alive_by_site"], "built": own["built_by_site"]}
        return pd.DataFrame({**columns, **({"delta_share": own["delta_share"]} if "delta_share" in own else {})})

    def to_pandas(self, table: str) -> pd.DataFrame:
        """One of the further tables: adversaries, aggregation, transfer, hidden, resolution, cancelling, slices, foresight,
        sizes, consistency. ``pieces`` says whose: learned, or a control's.

        Raises:
            KeyError: the report has no such table; the message says which it has, or why it was left out.
        """
        tables = self.record.get("tables", {})
        if table not in tables:
            why = self.record.get("left_out", {}).get(table)
            raise KeyError(
                f"{table!r} was left out: {why}."
                if why
                else f"The report has no table {table!r}{nearest(table, tables)}. It has: {', '.join(tables) or 'none'}."
            )
        return pd.DataFrame(tables[table])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the record as JSON."""
        write_json(Path(path), self.record)
