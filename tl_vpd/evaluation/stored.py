"""A report on disk: one JSON file, written whole, with a checksum of what it says.

Records of earlier versions have no checksum and other names of tables; they are read with the present ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tl_vpd.files.json_files import json_text, read_json, write_json

DIGEST = "sha256"
COUNTS = ("l0", "alive", "built", "tokens", "summed_rank")
BY_NAME = ("kl", "compute_recovered", "pgd_kl", "l0_by_site", "alive_by_site", "built_by_site")
RENAMED: dict[str, tuple[str, dict[str, str]]] = {
    "aggregation": ("union_test", {}),
    "transfer": ("mask_transfer", {}),
    "resolution": ("sparsity_sweep", {}),
    "slices": ("off_distribution", {"slice": "data"}),
    "foresight": ("future_leakage", {}),
    "sizes": ("feature_splitting", {"size": "decomposition"}),
}
"""Tables of stored reports -> their name, and the names of their columns."""


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a record with its checksum; errors as for ``json_text`` and ``write_file``."""
    write_json(path, {DIGEST: _digest(record), **record})


def read_record(path: Path) -> dict[str, Any]:
    """Reads a record.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, is damaged, or is not a report.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} is not a report: it holds a {type(content).__name__}, give what Evaluation.save wrote."
        )
    digest = content.pop(DIGEST, None)
    if digest is not None and digest != _digest(content):
        raise ValueError(f"{path} is damaged: its checksum differs from the one it was written with.")
    check_record(content, f"{path} is not a report that can be read")
    return upgraded(content)


def check_record(record: Mapping[str, Any], what: str) -> None:
    """Checks what every table and page of a report needs.

    Args:
        record: of an evaluation, or of one of its controls.
        what: the beginning of the message.

    Raises:
        ValueError: a figure is missing or is something else.
    """
    missing = [name for name in (*COUNTS, *BY_NAME, "pgd_kl_starts") if name not in record]
    if missing:
        raise ValueError(f"{what}: it lacks {', '.join(missing)}.")
    numbers: dict[str, Any] = {name: record[name] for name in (*COUNTS, *(n for n in record if n.endswith("_ce")))}
    for name in BY_NAME:
        if not isinstance(record[name], dict):
            raise ValueError(f"{what}: its {name} has no figures by name.")
        numbers |= {f"{name}.{key}": value for key, value in record[name].items()}
    for name, value in numbers.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{what}: its {name} is not a number.")
    if record["alive"] is None or "zero" not in record["kl"] or set(record["pgd_kl_starts"]) != set(record["pgd_kl"]):
        raise ValueError(f"{what}: its figures do not fit together.")
    for name, rows in _mapping(record, "tables", what).items():
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{what}: its table {name} is not a list of rows.")
    for name, control in _mapping(record, "controls", what).items():
        check_record(control, f"{what}: of the control {name}")
    if not all(isinstance(why, str) for why in _mapping(record, "left_out", what).values()):
        raise ValueError(f"{what}: its reasons are not text.")


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


def _mapping(record: Mapping[str, Any], name: str, what: str) -> dict[str, Any]:
    value = record.get(name, {})
    if not isinstance(value, dict):
        raise ValueError(f"{what}: its {name} has no entries by name.")
    return value


def _digest(record: Mapping[str, Any]) -> str:
    """The SHA-256 of a record as JSON, in its order of keys."""
    return hashlib.sha256(json_text(record).encode()).hexdigest()
