"""Labels of subcomponents and components: short texts, where they come from, and their scores.

    >>> labels = Labels({"blocks.1.mlp.W_in:12": Label("digits of a year", source="by hand")})
    >>> labels["blocks.1.mlp.W_in:12"].text, labels.text("blocks.1.mlp.W_in:13")
    ('digits of a year', '')

A label is what somebody or something wrote: one line of plain text, which pictures show and never run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import pandas as pd
from pydantic import Field

from tl_vpd.analysis.labels.scores import LabelScores, Score
from tl_vpd.analysis.labels.trials import CHANCE, Test
from tl_vpd.checks import choice, instance, integer, path_of, shown, text_of
from tl_vpd.files.json_files import read_json, write_json
from tl_vpd.frozen import Frozen
from tl_vpd.site import Subcomponent, nearest

LONGEST = 200
"""Characters of a label or of its source."""


@dataclass(frozen=True)
class Label:
    """A label of one subcomponent or component.

    Attributes:
        text: on one line.
        source: the model, method or person that it comes from.
        scores: by test, where a judge has scored it.

    Raises:
        TypeError: a text is not a string.
        ValueError: a text is empty, too long, or has line breaks or control characters.
    """

    text: str
    source: str
    scores: Mapping[Test, Score] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        for name in ("text", "source"):
            value = text_of(name, getattr(self, name))
            if not value.strip() or len(value) > LONGEST or not value.isprintable():
                raise ValueError(
                    f"{name}={shown(value)}: give a text of at most {LONGEST} characters on one line, without control characters."
                )
        instance("scores", self.scores, Mapping)  # type: ignore[type-abstract]
        for test, score in self.scores.items():
            if choice("scores", test, CHANCE) != instance(f"scores[{test!r}]", score, Score).test:
                raise ValueError(f"scores has a score of {score.test} as {test!r}: give each by its test.")

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Labels(Mapping[str, Label]):
    """Labels by address, of subcomponents (``blocks.1.attn.W_Q:316``) or components (``component:7``).

    Attributes:
        by_address: the labels.

    Raises:
        TypeError: it is not a mapping to labels.
        ValueError: an address is not one.
    """

    by_address: Mapping[str, Label]

    def __post_init__(self) -> None:
        instance("by_address", self.by_address, Mapping)  # type: ignore[type-abstract]
        checked = {}
        for address, label in self.by_address.items():
            checked[str(Subcomponent.parse(address))] = instance(f"by_address[{address!r}]", label, Label)
        object.__setattr__(self, "by_address", MappingProxyType(checked))

    def __getitem__(self, address: str | Subcomponent) -> Label:
        text = str(Subcomponent.parse(address))
        if text not in self.by_address:
            raise KeyError(f"{text} has no label{nearest(text, self.by_address)}.")
        return self.by_address[text]

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_address)

    def __len__(self) -> int:
        return len(self.by_address)

    def text(self, address: str | Subcomponent) -> str:
        """The text of a label, empty where there is none."""
        return str(self.by_address.get(str(Subcomponent.parse(address)), ""))

    def beside(self, table: pd.DataFrame) -> pd.DataFrame:
        """Any table with the labels of what it names: of subcomponents, nodes of a graph or an audit, edges, pairs, edits.

        After each column of addresses (with positions or without) there is one with their labels: ``label`` after
        ``subcomponent`` and ``node``, ``source label`` after ``source``.

        Args:
            table: of which no column is changed.

        Raises:
            TypeError: it is not a DataFrame.
            ValueError: it has a column of that name.
        """
        instance("table", table, pd.DataFrame)
        result = table.copy()
        for column in table:
            texts = [str(self.by_address.get(str(value).partition("@")[0], "")) for value in table[column]]
            if any(texts):
                name = "label" if column in ("subcomponent", "node") else f"{column} label"
                if name in result:
                    raise ValueError(f"The table has a column {name!r}: leave it out.")
                result.insert(int(result.columns.get_loc(column)) + 1, name, texts)
        return result

    def with_scores(self, scores: LabelScores) -> Labels:
        """The same labels with a judge's scores; those of addresses without a label are left out."""
        instance("scores", scores, LabelScores)
        return Labels({a: replace(label, scores=scores.scores.get(a, label.scores)) for a, label in self.items()})

    def to_pandas(self) -> pd.DataFrame:
        """One row per address: subcomponent, label, source, and the score of each test (NaN where there is none)."""
        rows = [
            {"subcomponent": address, "label": label.text, "source": label.source}
            | {test: label.scores[test].value if test in label.scores else float("nan") for test in CHANCE}
            for address, label in self.items()
        ]
        return pd.DataFrame(rows, columns=["subcomponent", "label", "source", *CHANCE])

    def top(self, k: int = 10) -> pd.DataFrame:
        """The ``k`` labels of the largest mean score."""
        k, table = integer("k", k, minimum=0), self.to_pandas()
        order = table[list(CHANCE)].mean(axis=1).sort_values(ascending=False, kind="stable").index
        return table.loc[order].head(k).reset_index(drop=True)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes a JSON file.

        Raises:
            OSError: it cannot be written.
        """
        path = path_of("path", path)
        stored = {
            address: {
                "text": label.text,
                "source": label.source,
                "scores": {test: [score.right, score.n] for test, score in label.scores.items()},
            }
            for address, label in self.items()
        }
        write_json(path, {"format": 1, "labels": stored})
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Labels:
        """Reads what ``save`` wrote, or the same written by hand.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a file of labels, or a label or address in it is not one.
        """
        path = path_of("path", path)
        content = read_json(path)
        try:
            if not isinstance(content, dict):
                raise ValueError("it is a list or a number.")
            stored = _Stored(**content)
            labels = {
                address: Label(one.text, one.source, {t: Score(t, *numbers) for t, numbers in one.scores.items()})
                for address, one in stored.labels.items()
            }
            return cls(labels)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a file of labels: {error}") from error


class _StoredLabel(Frozen):
    text: str
    source: str
    scores: dict[Test, tuple[int, int]] = Field(default_factory=dict)


class _Stored(Frozen):
    format: Literal[1]
    labels: dict[str, _StoredLabel]
