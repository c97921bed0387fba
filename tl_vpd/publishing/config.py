"""What a card says that a decomposition's record cannot know, and what it needs of a report.

>>> CardConfig(licence="MIT licence")
Traceback (most recent call last):
ValueError: CardConfig: licence='MIT licence': give an identifier of the Hub's list, such as 'mit' or 'apache-2.0'.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pandas as pd
from pydantic import field_validator

from tl_vpd.checks import shown
from tl_vpd.files.hub import check_repository
from tl_vpd.frozen import Frozen


class CardConfig(Frozen):
    """Licences and names for a decomposition's card; what is left out is called "not stated" there."""

    licence: str | None = None
    """Of the decomposition, by its identifier in the Hub's list, such as ``mit``."""
    base_model: str | None = None
    """The target's name on the Hub (None: its name in the record, where that has the form ``user/repo``)."""
    target_licence: str | None = None
    """Of the target."""
    datasets: tuple[str, ...] = ()
    """The names on the Hub of the text that the decomposition was trained on."""
    text_licence: str | None = None
    """Of that text."""

    @field_validator("licence", "target_licence", "text_licence")
    @classmethod
    def _an_identifier(cls, licence: str | None) -> str | None:
        if licence is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]{0,59}", licence):
            raise ValueError("give an identifier of the Hub's list, such as 'mit' or 'apache-2.0'")
        return licence

    @field_validator("base_model")
    @classmethod
    def _a_repository(cls, name: str | None) -> str | None:
        if name is not None:
            check_repository(name)
        return name

    @field_validator("datasets")
    @classmethod
    def _repositories(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            check_repository(name)
        return names


@runtime_checkable
class Report(Protocol):
    """What a card needs of a report; ``tl_vpd.Evaluation`` has it."""

    @property
    def record(self) -> dict[str, Any]:
        """The figures, as JSON has them."""

    @property
    def warnings(self) -> list[str]:
        """One sentence for every fault."""

    def table(self) -> pd.DataFrame:
        """One row for each mask mode."""

    def save(self, path: Path) -> None:
        """Writes the record as JSON."""


def check_report(report: Any, counts: dict[str, int]) -> None:
    """Raises TypeError unless a report is one, ValueError where it is of a decomposition with other numbers of subcomponents."""
    if not isinstance(report, Report):
        raise TypeError(
            f"report={shown(report)} is a {type(report).__name__}: give what tl_vpd.evaluate returns, or "
            "tl_vpd.Evaluation.load('metrics.json')."
        )
    built = report.record["built_by_site"]
    other = [name for name in {**built, **counts} if built.get(name) != counts.get(name)]
    if other:
        name = other[0]
        raise ValueError(
            f"The report is of another decomposition: it says C={built.get(name)} at {shown(name)}, and this one has "
            f"C={counts.get(name)}; evaluate this one."
        )
