"""``Evaluation``: the report as one JSON record, its tables, and the faults that it shows.

>>> from tl_vpd import bundled
>>> report = bundled.evaluation()
>>> float(report.table().loc["zero", "share_of_zero"])
1.0
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from tl_vpd.components.storage import write_json
from tl_vpd.evaluation.modes import ROWS
from tl_vpd.evaluation.verdict import checks, number, warnings_of
from tl_vpd.site import nearest

RENAMED: dict[str, tuple[str, dict[str, str]]] = {
    "aggregation": ("union_test", {}),
    "transfer": ("mask_transfer", {}),
    "resolution": ("sparsity_sweep", {}),
    "slices": ("off_distribution", {"slice": "data"}),
    "foresight": ("future_leakage", {}),
    "sizes": ("feature_splitting", {"size": "decomposition"}),
}
"""Tables of stored reports -> their name, and the names of their columns."""


@dataclass(frozen=True)
class Evaluation:
    """The flat record of an evaluation; ``controls`` holds records of the same form, ``tables`` the rows of all tables."""

    record: dict[str, Any]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Evaluation:
        """Reads a saved record.

        Args:
            path: of the JSON file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not JSON.
        """
        return cls(upgraded(json.loads(Path(path).read_text(encoding="utf-8"))))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the record as JSON."""
        write_json(Path(path), self.record)

    @property
    def warnings(self) -> list[str]:
        """What is wrong with the decomposition by this evaluation, one sentence each (none: no check failed)."""
        return warnings_of(self.record)

    def checks(self) -> pd.DataFrame:
        """Every check that the record allows: the figure, its limit, whether it is a fault, and a sentence."""
        return pd.DataFrame([vars(check) for check in checks(self.record)]).set_index("check")

    def table(self) -> pd.DataFrame:
        """One row for each mask mode, with the controls' distances.

        Columns: CE, CE above the target, its share of (zero − target), KL (MSE) with its interval, compute recovered.
        """
        record = self.record
        rows = []
        for mode in (row for row in ROWS if row in record["kl"]):
            row: dict[str, Any] = {"mode": mode}
            if "target_ce" in record:
                target, zero, ce = (number(record[name]) for name in ("target_ce", "zero_ce", f"{mode}_ce"))
                row |= {"ce": ce, "above_target": ce - target, "share_of_zero": (ce - target) / (zero - target)}
            row[record.get("output", "kl")] = number(record["kl"][mode])
            if (bounds := record.get("intervals", {}).get("kl", {}).get(mode)) is not None:
                row["low"], row["high"] = bounds
            if record["compute_recovered"]:
                row["compute_recovered"] = number(record["compute_recovered"][mode])
            for pieces, control in record.get("controls", {}).items():
                if mode in control["kl"]:
                    row[f"{pieces} pieces"] = number(control["kl"][mode])
            rows.append(row)
        return pd.DataFrame(rows).set_index("mode")

    def pgd_table(self) -> pd.DataFrame:
        """KL under the fresh adversary by number of steps (steps × size = 2)."""
        curve = self.record["pgd_kl"]
        return pd.DataFrame({"steps": [int(k) for k in curve], "kl": list(curve.values())}).set_index("steps")

    def sites_table(self) -> pd.DataFrame:
        """L0 per token, alive and built subcomponents by site, and Δ's share of the weight's square."""
        record = self.record
        columns = {"l0": record["l0_by_site"], "alive": record["alive_by_site"], "built": record["built_by_site"]}
        return pd.DataFrame({**columns, **({"delta_share": record["delta_share"]} if "delta_share" in record else {})})

    def to_pandas(self, table: str) -> pd.DataFrame:
        """One of the further tables: adversaries, union_test, mask_transfer, hidden, sparsity_sweep, cancelling,
        off_distribution, future_leakage, feature_splitting, consistency.

        The column ``pieces`` says whose: learned, or a control's.

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


def upgraded(record: Mapping[str, Any]) -> dict[str, Any]:
    """A stored record with the present names of tables and columns.

    >>> upgraded({"tables": {"sizes": [{"size": "C-2", "alive": 7}]}, "left_out": {"foresight": "rows are padded"}})
    {'tables': {'feature_splitting': [{'decomposition': 'C-2', 'alive': 7}]}, 'left_out': {'future_leakage': 'rows are padded'}}
    """
    result = dict(record)
    if "tables" in record:
        result["tables"] = {}
        for stored, rows in record["tables"].items():
            name, columns = RENAMED.get(stored, (stored, {}))
            result["tables"][name] = [{columns.get(c, c): value for c, value in row.items()} for row in rows]
    if "left_out" in record:
        result["left_out"] = {RENAMED.get(what, (what,))[0]: why for what, why in record["left_out"].items()}
    return result
