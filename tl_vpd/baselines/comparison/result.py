"""The result of ``compare``: tables, and the figures that every artefact is measured against."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from tl_vpd.checks import choice, integer, path_of
from tl_vpd.evaluation.tables import plain
from tl_vpd.files.json_files import read_json, write_json
from tl_vpd.printing import Printed

TABLES = ("summary", "methods", "replacement", "modules", "attacks")


@dataclass(frozen=True)
class Comparison(Printed):
    """Artefacts on the same axes.

    Attributes:
        tables: ``summary`` (a row for each artefact and threshold), ``methods`` (each method's artefacts of one size
            together: spread over seeds, splitting over sizes, consistency), ``replacement`` (every way of replacing), ``modules``
            (every weight matrix or layer) and ``attacks`` (every budget).
        target_ce: the target's cross-entropy of the next token, in nats.
        zero: ``kl`` and ``ce_increase`` when the replaced MLPs put out 0.
        tokens: real tokens that everything was measured on.
        layers: whose MLPs are replaced.
    """

    tables: Mapping[str, pd.DataFrame] = field(repr=False)
    target_ce: float
    zero: Mapping[str, float]
    tokens: int
    layers: tuple[int, ...]

    def to_pandas(self, table: str = "summary") -> pd.DataFrame:
        """One of the tables (a copy)."""
        return self.tables[choice("table", table, TABLES)].copy()

    def top(self, k: int = 5, *, by: str = "kl") -> pd.DataFrame:
        """The k rows of the summary with the smallest figure.

        Args:
            k: how many.
            by: a column of numbers.

        Raises:
            ValueError: there is no such column.
        """
        summary = self.tables["summary"]
        numbers = list(summary.select_dtypes("number").columns)
        return summary.nsmallest(integer("k", k, minimum=1), choice("by", by, numbers))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes everything as JSON; returns the path. What is not defined is null."""
        path = path_of("path", path)
        write_json(path, self.as_json())
        return path

    def as_json(self) -> dict[str, Any]:
        """Everything as data."""
        return {
            "comparison": {name: plain(table) for name, table in self.tables.items()},
            "target_ce": self.target_ce,
            "zero": dict(self.zero),
            "tokens": self.tokens,
            "layers": list(self.layers),
        }

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Comparison:
        """Reads what ``save`` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not JSON, or not a comparison.
        """
        path = path_of("path", path)
        content = read_json(path)
        if not isinstance(content, dict) or set(content.get("comparison", ())) != set(TABLES):
            raise ValueError(f"{path} is not a comparison: give what Comparison.save wrote.")
        tables = {
            name: pd.DataFrame(rows).replace({None: float("nan")}) for name, rows in content.pop("comparison").items()
        }
        return cls(tables, content["target_ce"], content["zero"], content["tokens"], tuple(content["layers"]))
