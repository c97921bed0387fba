"""``python -m tests.matrix.table build/matrix/*.json --out docs/compatibility.md``: the matrix's results as a page."""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.matrix.cells import FLAGS
from tests.matrix.families import FAMILIES
from tests.matrix.models import KINDS

NAMES = {
    "HookedTransformer": "HookedTransformer",
    "bridge": "bridge",
    "compatible": "bridge, compatibility mode",
    "native": "bridge, native",
}
Row = dict[str, Any]
Column = tuple[str, str]

HEAD = """# Compatibility

For people who want to know whether their model and flags work: what is supported with which TransformerLens, model class,
architecture and flag. `make test-matrix` makes this page: it runs every cell, in an environment per version, on two-layer models
built offline with every parameter random.

In a cell marked ✓:

1. with every mask and Δ's at 1 the logits are the plain model's to the bit, also while every hook listens;
2. masks constant over positions (Δ at 0.3) give the logits of a model whose weights were edited by hand: within 1e-10 where the
   model computes in float64 throughout, 1e-4 in float32 or where a library casts norms or softmaxes to it, and 1e-2 (bfloat16) or
   1.5e-3 (float16) of the logits' spread as a root mean square;
3. masks of every position give the logits of an independent float64 forward that forms Δ. This runs once per family and class,
   without flags, on a separately built transformers (or native) model, or on a forward written out for families without one;
4. scaled `component_acts` give the logits of an edit along U;
5. gradients reach V, U and masks but not the model's weights in a tapped pass, and the weights' gradients in an attached pass
   with masks at 1 are those of the plain model.

Cells of flags run 1, 2, 4 and 5 in float64, and 1 and 2 in float32 too. *Left padding*: importances and masked logits of a
left-padded prompt are those of the prompt without padding. *KV cache*: generation and single steps under masks that need no
importances are the same with and without a cache, and modes that need importances refuse one. *One file for every class*: a
decomposition made, saved and loaded on one class attaches to the others of the same version, with equal importances (2e-5) and
masked logits (1e-4), both for raw and for processed weights, and is refused where the weights are processed differently.
"""

REFUSALS = """TransformerLens refuses when the flag is set or the model is made, with or without a decomposition: leave the
flag off.
"""


def load(files: Iterable[str]) -> list[Row]:
    """The cells of all files, each with its version."""
    rows: list[Row] = []
    for file in files:
        data = json.loads(Path(file).read_text())
        rows += [{**cell, "version": data["version"]} for cell in data["cells"]]
    return rows


def page(rows: Sequence[Row]) -> str:
    """The page as Markdown."""
    notes = Notes()
    columns = sorted({(r["version"], r["kind"]) for r in rows}, key=lambda c: (_number(c[0]), KINDS.index(c[1])))
    families = table("family", list(FAMILIES), columns, rows, "family", "flags", notes)
    flags = table("flag", list(FLAGS), columns, rows, "flag", "families", notes)
    total = {s: sum(r["status"] == s for r in rows) for s in ("ok", "refused", "absent", "failed")}
    summary = (
        f"{len(rows)} cells: {total['ok']} pass, {total['refused']} are refused, {total['absent']} do not exist"
        + (f", **{total['failed']} failed**" if total["failed"] else "")
        + ". `✓`: all its cells pass; `–`: it has none; a number in brackets: some are refused, see the list below."
    )
    return "\n".join(
        [HEAD, summary, "\n## Families\n", "Over all flags.\n", families, "\n## Flags\n", "Over all families.\n", flags,
         "\n## Refusals\n", REFUSALS, notes.text(), "\n## What does not exist\n", absent(rows), ""]
    )  # fmt: skip


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


class Notes:
    """Refusals by message, numbered as they first appear."""

    def __init__(self) -> None:
        self.numbers: dict[tuple[str, str], int] = {}
        self.where: dict[tuple[str, str], list[Row]] = defaultdict(list)

    def number(self, row: Row) -> int:
        """The number of a refusal."""
        key = (row["by"], row["message"])
        if row not in self.where[key]:
            self.where[key].append(row)
        return self.numbers.setdefault(key, len(self.numbers) + 1)

    def text(self) -> str:
        """The numbered list."""
        lines = []
        for (by, message), number in self.numbers.items():
            rows = self.where[by, message]
            lines.append(f"{number}. {by}: “{' '.join(message.split())}”\n   {_summary(rows)}")
        return "\n".join(lines) or "None."


def _summary(rows: Sequence[Row]) -> str:
    """Where some cells are, flags first; classes with the same families and flags stand together."""
    families: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in rows:
        families[row["flag"], f"{row['version']} {NAMES[row['kind']]}"].append(row["family"])
    classes: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (flag, column), members in families.items():
        classes[flag, ", ".join(members)].append(column)
    flags: dict[str, list[str]] = defaultdict(list)
    for (flag, members), columns in classes.items():
        flags[f"{'; '.join(columns)}: {members}"].append(flag)
    parts = [f"*{'every flag' if len(f) == len(FLAGS) else ', '.join(f)}* ({where})" for where, f in flags.items()]
    return "; ".join(parts) + "."


def table(
    head: str, names: Sequence[str], columns: Sequence[Column], rows: Sequence[Row], axis: str, other: str, notes: Notes
) -> str:
    """A Markdown table: ``names`` down, versions and classes across."""
    lines = [
        f"| {head} | " + " | ".join(f"{version} {NAMES[kind]}" for version, kind in columns) + " |",
        "| --- |" + " --- |" * len(columns),
    ]
    for name in names:
        cells = [
            cell([r for r in rows if r[axis] == name and (r["version"], r["kind"]) == column], other, notes.number)
            for column in columns
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(rows: Sequence[Row], other: str, number: Callable[[Row], int]) -> str:
    """The text of one table cell that stands for several cells of the matrix."""
    by = {status: [r for r in rows if r["status"] == status] for status in ("ok", "refused", "absent", "failed")}
    refused = "".join(f" [{n}]" for n in sorted({number(r) for r in by["refused"]}))
    if by["failed"]:
        return f"**{len(by['failed'])} failed**{refused}"
    if by["ok"]:
        return f"✓{refused}"
    return f"refused{refused}" if refused else "–"


def absent(rows: Sequence[Row]) -> str:
    """Why cells do not exist."""
    by: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["status"] == "absent":
            by[row["message"]].append(row)
    return "\n".join(f"* {message}: {_summary(members)}" for message, members in by.items()) or "Everything does."


def main() -> int:
    """Writes the page."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix.table")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--out", default="docs/compatibility.md")
    options = parser.parse_args()
    Path(options.out).write_text(page(load(options.files)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
