"""The figures of a card: those of a report, and those of an import's certificate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tl_vpd.publishing.config import Report
from tl_vpd.publishing.text import figure, plain, table

ATTACK_COLUMNS = ("pieces", "adversary", "steps", "starts", "tokens", "kl", "kl_low", "kl_high")


def evaluation_section(report: Report | None) -> str:
    """Mode table, counts, attacks, future leakage and faults."""
    if report is None:
        return "## Evaluation\n\n**Not evaluated.** No report came with this decomposition."
    record, modes = report.record, report.table().reset_index()
    unit = "KL from the target, in nats per token" if record.get("output", "kl") == "kl" else "mean squared errors"
    rows = f"{figure(record['rows'])} rows, " if "rows" in record else ""
    sections = [
        "## Evaluation",
        f"On {rows}{figure(record['tokens'])} tokens; distances are {unit}. Important per token (L0): {figure(record['l0'])} of "
        f"{figure(record['alive'])} alive and {figure(record['built'])} built subcomponents. Columns named *… pieces* are "
        "controls, which a decomposition has to beat.",
        table(list(modes.columns), modes.astype(object).to_numpy().tolist()),
        _attacks(record),
        _future_leakage(record),
        _nontarget(record),
        _nulls(record),
        _faults(report.warnings),
    ]
    return "\n\n".join(section for section in sections if section)


def _attacks(record: dict[str, Any]) -> str:
    """Every attack, with its budget, on the decomposition and on its controls."""
    rows = list(record.get("tables", {}).get("adversaries", []))
    attacked = {(row.get("pieces", "learned"), row.get("adversary")) for row in rows}
    for pieces, of in {"learned": record, **record.get("controls", {})}.items():
        if (pieces, "shared") not in attacked:
            starts = of.get("pgd_kl_starts", {})
            rows += [
                {
                    "pieces": pieces,
                    "adversary": "shared",
                    "steps": int(steps),
                    "starts": len(starts.get(steps, [])),
                    "kl": kl,
                }
                for steps, kl in of["pgd_kl"].items()
            ]
    if not rows:
        return "### Attacks\n\n**Not attacked.** How bad the worst masks are is not known."
    said = (
        "The worst masks that an adversary with this budget found, so each distance is a lower bound. *shared*: the same "
        "sources at every token."
    )
    return _rows("### Attacks", said, rows, [name for name in ATTACK_COLUMNS if any(name in row for row in rows)])


def _future_leakage(record: dict[str, Any]) -> str:
    """What masks made from the whole window gain over those made from the prefix."""
    rows = record.get("tables", {}).get("future_leakage", [])
    title = "### Future leakage"
    if not rows:
        why = record.get("left_out", {}).get("future_leakage")
        return f"{title}\n\n**Not measured**{f': {plain(why)}' if why else ''}."
    return _rows(title, "Importances from the whole window against importances from the tokens up to a position.", rows)


def _nontarget(record: dict[str, Any]) -> str:
    """What a targeted decomposition leaves as it is; empty where other data were not measured."""
    rows = record.get("tables", {}).get("nontarget", [])
    said = "With Δ on: masks of the subcomponents change other data by so much; *ablated*: all of them taken out."
    return _rows("### Other data", said, rows) if rows else ""


def _nulls(record: dict[str, Any]) -> str:
    """Decompositions of models in which nothing was learned; empty where there are none."""
    rows = record.get("tables", {}).get("nulls", [])
    said = "The same figures for decompositions of other models, such as this one with its weights shuffled."
    return _rows("### Nulls", said, rows) if rows else ""


def _rows(title: str, said: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """A table of a report, with all its columns if they are not chosen."""
    columns = list(dict.fromkeys(name for row in rows for name in row)) if columns is None else columns
    return f"{title}\n\n{said}\n\n{table(columns, [[row.get(name) for name in columns] for row in rows])}"


def _faults(warnings: list[str]) -> str:
    """The faults that the report's checks see."""
    if not warnings:
        return (
            "### Faults\n\nNone of the report's checks failed. A decomposition without a known fault need not be right."
        )
    return "### Faults\n\n" + "\n".join(f"* {plain(sentence, longest=1000)}" for sentence in warnings)


def certificate_section(record: dict[str, Any]) -> str:
    """What an import was measured to be; empty where it was not imported."""
    certificate = record.get("certificate")
    if not isinstance(certificate, dict):
        return ""
    rows: list[tuple[str, str, Any]] = []
    for name, value in certificate.items():
        if isinstance(value, dict):
            source = "run's own" if name == "own_metrics" else name
            rows += [(source, str(key), number) for key, number in value.items()]
        else:
            rows.append(("measured", name, value))
    said = "Measured on a few rows when it was imported, beside the run's own figures; KLs in nats per token."
    return f"## Certificate of the import\n\n{said}\n\n{table(['source', 'figure', 'value'], rows)}"
