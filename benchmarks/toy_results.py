"""The file of measurements on toys: entries by toy and method, with lists over seeds.

>>> table(read(RESULTS)).head()                          # doctest: +SKIP
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from tl_vpd.baselines import METHODS, APDConfig
from tl_vpd.files.atomic import make_folder
from tl_vpd.files.json_files import read_json, write_json
from tl_vpd.files.versions import library_versions
from tl_vpd.training.stored_config import upgraded

RESULTS = Path("benchmarks/results/ground_truth.json")
PUBLISHED: dict[str, dict[str, dict[str, tuple[float, float]]]] = {
    "tms_5_2": {"spd": {"mmcs": (1.000, 0.000), "ml2r": (0.993, 0.002)}},
    "tms_40_10": {"spd": {"mmcs": (1.000, 0.000), "ml2r": (1.010, 0.007)}},
    "tms_5_2_id": {"spd": {"mmcs": (1.000, 0.000), "ml2r": (0.992, 0.010)}},
    "tms_40_10_id": {"spd": {"mmcs": (1.000, 0.000), "ml2r": (1.031, 0.001)}},
}
"""By toy, method and measure: mean and standard deviation over seeds. SPD: table 1 of its paper (arXiv 2506.20790, version 1), of
the embedding W."""


def read(path: Path) -> dict[str, Any]:
    """The results in a file (empty if there is no file); raises ValueError if it is not one of results."""
    results = read_json(path) if path.exists() else {}
    if not isinstance(results, dict):
        raise ValueError(f"{path} holds a {type(results).__name__}: give a file of results, or a new one.")
    return results


def add(path: Path, toy: str, method: str, entry: dict[str, Any]) -> None:
    """Adds an entry to the file: lists over seeds, in the order of measurement; settings and true counts once."""
    results = read(path)
    entries = results.setdefault(toy, {}).setdefault(method, {})
    _append(entries, {key: value for key, value in entry.items() if key not in ("settings", "true")})
    entries |= {"settings": entry["settings"], "true": entry.get("true", {}), "versions": library_versions()}
    make_folder(path.parent)
    write_json(path, results)


def _append(lists: dict[str, Any], entry: dict[str, Any]) -> None:
    for key, value in entry.items():
        if isinstance(value, dict):
            _append(lists.setdefault(key, {}), value)
        else:
            lists.setdefault(key, []).append(value)


def is_measured(path: Path, toy: str, method: str, seed: int, settings: dict[str, Any]) -> bool:
    """Whether the file has the entry (``settings``: the config without its seed, as JSON); raises ValueError where it has entries
    of this toy and method that were made with other settings.
    """
    entries = read(path).get(toy, {}).get(method)
    if entries is None:
        return False
    # Settings that are newer than the entry have their defaults there.
    config = METHODS[method].config
    stored = entries["settings"] if config is APDConfig else upgraded(entries["settings"])
    if config(**stored).model_dump(mode="json", exclude={"seed"}) != settings:
        raise ValueError(f"{path} has {toy} by {method} with other settings: choose another file with --out.")
    return seed in entries["seed"]


def table(results: dict[str, Any]) -> pd.DataFrame:
    """One row per entry: MMCS, ML2R, alive of true by site, errors of importance patterns, reconstruction.

    Where a method's authors have published scores on a toy, a row of these stands after the method's.
    """
    rows = []
    for toy, methods in results.items():
        for method, entries in methods.items():
            rows += [_row(toy, method, entries, i) for i in range(len(entries["seed"]))]
            scores = PUBLISHED.get(toy, {}).get(method)
            if scores is not None:
                means = {name: mean for name, (mean, _) in scores.items()}
                rows.append({"toy": toy, "method": f"{method}, published", **means})
    frame = pd.DataFrame(rows)
    return frame.astype({"seed": "Int64"}) if "seed" in frame else frame


def _row(toy: str, method: str, entries: dict[str, Any], i: int) -> dict[str, Any]:
    row: dict[str, Any] = {"toy": toy, "method": method, "seed": entries["seed"][i]}
    row |= {key: entries[key][i] for key in ("mmcs", "ml2r") if key in entries}
    row |= {f"alive {site}": f"{entries['alive'][site][i]}/{n}" for site, n in entries["true"].items()}
    errors = entries["by_site"].get("pattern_errors", {})
    if errors:
        row["pattern errors"] = int(sum(values[i] for values in errors.values()))
    known = {**entries.get("latents", {}), **entries.get("needed", {})}
    overlaps = [values["overlap"][i] for values in known.values()]
    if overlaps:
        row["overlap"] = round(sum(overlaps) / len(overlaps), 3)
    row |= {key: entries["reconstruction"][key][i] for key in ("stochastic", "adversarial")}
    return row | {"seconds": entries["seconds"][i]}
