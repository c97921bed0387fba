"""Tables in pages: each stands between ``<!-- name -->`` and ``<!-- end -->``, and is made anew from its name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

Rows = list[dict[str, str]]
Record = Mapping[str, Any]
BLOCK = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def markdown(rows: Rows) -> str:
    """A table of texts."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([row[c] for c in columns] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def formatted(records: Iterable[Record], columns: Mapping[str, str]) -> str:
    """A table of records, each column by its template, such as ``"{seconds:.2g}"``."""
    return markdown([{name: text.format_map(record) for name, text in columns.items()} for record in records])


def filled(page: str, table: Callable[[str], str]) -> str:
    """A page with each table made anew from its name."""
    return BLOCK.sub(lambda match: match[1] + table(match[2]) + match[3], page)


def fill(page: Path, table: Callable[[str], str]) -> None:
    """Writes the tables of a page anew."""
    page.write_text(filled(page.read_text(encoding="utf-8"), table), encoding="utf-8")
