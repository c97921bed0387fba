"""``Evaluation``: the report as one JSON record, its tables, and the faults that it shows.

>>> from tl_vpd import bundled
>>> report = bundled.evaluation()
>>> float(report.table().loc["zero", "share_of_zero"])
1.0
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pandas as pd

from tl_vpd.checks import path_of, shown
from tl_vpd.evaluation.check import number
from tl_vpd.evaluation.modes import ROWS
from tl_vpd.evaluation.record import defined
from tl_vpd.evaluation.stored import read_record, write_record
from tl_vpd.evaluation.verdict import checks, warnings_of
from tl_vpd.site import nearest


@dataclass(frozen=True)
class Evaluation:
    """The flat record of an evaluation; ``controls`` holds records of the same form, ``tables`` the rows of all tables.

    Figures that are NaN or infinite become None, with the reason under their name in ``left_out``.
    """

    record: dict[str, Any]

    def __post_init__(self) -> None:
        record, reasons = defined(self.record)
        if reasons:
            record["left_out"] = {**record.get("left_out", {}), **reasons}
        object.__setattr__(self, "record", record)

    def __repr__(self) -> str:
        record = self.record
        kl = {
            mode: record["kl"][mode]
            for mode in ("unmasked", "stochastic", "rounded", "zero")
            if mode in record.get("kl", {})
        }
        kl |= {f"PGD-{steps}": value for steps, value in record.get("pgd_kl", {}).items()}
        parts = [f"L0 {number(record['l0']):.4g} of {record['alive']} alive"] if "l0" in record else []
        parts += [f"distances: {', '.join(f'{name} {number(value):.4g}' for name, value in kl.items())}"] if kl else []
        return f"Evaluation({'; '.join([*parts, 'see .warnings, .table(), .checks()'])})"

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Evaluation:
        """Reads a saved record.

        Args:
            path: of the JSON file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or is not a report.
        """
        return cls(read_record(path_of("path", path)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the record as JSON with a checksum; an older file is replaced, or stays whole if writing fails.

        Args:
            path: of the JSON file; its folder must exist.

        Raises:
            OSError: it cannot be written; the message names the folder and what is intact.
            TypeError: the record holds what is not data.
        """
        write_record(path_of("path", path), self.record)

    @property
    def warnings(self) -> list[str]:
        """What is wrong with the decomposition by this evaluation, one sentence each (none: no check failed)."""
        return warnings_of(self.record)

    def checks(self) -> pd.DataFrame:
        """Every check that the record allows: the figure, its limit, whether it is a fault, and a sentence."""
        return pd.DataFrame([vars(check) for check in checks(self.record)]).set_index("check")

    def table(self) -> pd.DataFrame:
        """One row for each mask mode, with the controls' distances.

        Columns: CE, CE above the target, its share of (zero − target), how much of it later tokens have lowered (``leak``), KL
        (MSE) with its interval, compute recovered.
        """
        record = self.record
        rows = []
        for mode in (row for row in ROWS if row in record["kl"]):
            row: dict[str, Any] = {"mode": mode}
            if "target_ce" in record:
                target, zero, ce = (number(record[name]) for name in ("target_ce", "zero_ce", f"{mode}_ce"))
                share = (ce - target) / (zero - target) if zero != target else float("nan")
                row |= {"ce": ce, "above_target": ce - target, "share_of_zero": share}
            if mode in record.get("leak", {}):
                row["leak"] = number(record["leak"][mode])
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
        """KL under the standard adversary by steps (steps × size = 2): the worst start with its interval, and all starts."""
        record = self.record
        bounds = record.get("intervals", {}).get("pgd_kl", {})
        rows = [
            {
                "steps": int(k),
                "kl": kl,
                **dict(zip(("low", "high"), bounds.get(k) or (None, None), strict=True)),
                "starts": list(record["pgd_kl_starts"][k]),
            }
            for k, kl in record["pgd_kl"].items()
        ]
        return pd.DataFrame(rows, columns=["steps", "kl", "low", "high", "starts"]).set_index("steps")

    def sites_table(self) -> pd.DataFrame:
        """L0 per token, alive and built subcomponents by site, and Δ's share of the weight's square."""
        record = self.record
        columns = {"l0": record["l0_by_site"], "alive": record["alive_by_site"], "built": record["built_by_site"]}
        return pd.DataFrame({**columns, **({"delta_share": record["delta_share"]} if "delta_share" in record else {})})

    def to_pandas(self, table: str) -> pd.DataFrame:
        """One of the further tables: adversaries, union_test, mask_transfer, hidden, sparsity_sweep, cancelling,
        off_distribution (nontarget, of a targeted decomposition), future_leakage, feature_splitting, consistency, nulls.

        The column ``pieces`` says whose: learned, or a control's.

        Raises:
            KeyError: the report has no such table; the message says which it has, or why it was left out.
        """
        tables = self.record.get("tables", {})
        if not isinstance(table, str) or table not in tables:
            why = self.record.get("left_out", {}).get(table) if isinstance(table, str) else None
            raise KeyError(
                f"{table!r} was left out: {why}."
                if why
                else f"The report has no table {shown(table)}{nearest(table, tables)}. It has: {', '.join(tables) or 'none'}."
            )
        return pd.DataFrame(tables[table])
