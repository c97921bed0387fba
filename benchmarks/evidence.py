"""Tables and pictures of docs/evidence.md from what ``python -m tl_vpd.toys.run`` has measured and kept.

python -m benchmarks.evidence                                     # the tables of benchmarks/results/ground_truth.json
python -m benchmarks.evidence --picture tms_5_2 0 --out docs/tms_5_2.png      # from the run kept in build/toys
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tl_vpd.baselines import RankOne
from tl_vpd.decomposition import Decomposition
from tl_vpd.toys import TOYS
from tl_vpd.toys.run import RESULTS, WORK, read, target_of
from tl_vpd.viz.ground_truth import ground_truth
from tl_vpd.viz.ground_truth import needed as needed_picture


def rows(results: dict[str, Any]) -> list[str]:
    """Sites of which it is known what they hold, in Markdown: a row a toy, method and site; ranges and lists are over seeds."""
    columns = "toy | method | seeds | site | MMCS | ML2R | alive (true) | count errors | pattern errors | minutes"
    lines = [f"| {columns} |", "| --- " * 10 + "|"]
    for name, methods in results.items():
        for method, own in methods.items():
            by_site = own["by_site"]
            for number, (site, true) in enumerate(own["true"].items()):
                found = {key: by_site.get(key, {}).get(site, []) for key in by_site}
                first = [f"`{name}`", method, str(len(own["seed"]))] if number == 0 else [""] * 3
                minutes = _list([round(s / 60) for s in own["seconds"]]) if number == 0 else ""
                alive = f"{_list(own['alive'][site])} ({true})"
                counts, patterns = (
                    _list([int(v) for v in found.get(f"{key}_errors", [])]) for key in ("count", "pattern")
                )
                entries = int(found["pattern_entries"][0])
                cells = [*first, f"`{site}`", _range(found["mmcs"], 5), _range(found["ml2r"], 4), alive, counts]
                lines.append("| " + " | ".join([*cells, f"{patterns} of {entries:,}", minutes]) + " |")
    return lines


def distances(results: dict[str, Any]) -> list[str]:
    """What outputs are off by under masks, a row a toy and method: means over seeds, the adversary's largest."""
    columns = {"unmasked": "all pieces", "importances": "importances", "rounded": "rounded", "stochastic": "random"}
    lines = [f"| toy | method | {' | '.join(columns.values())} | adversary | none |", "| --- " * 8 + "|"]
    for name, methods in results.items():
        for method, own in methods.items():
            found = own["reconstruction"]
            means = [f"{sum(found[key]) / len(found[key]):.2g}" for key in columns]
            ends = [f"{max(found['adversarial']):.2g}", f"{found['zero'][0]:.2g}"]
            lines.append("| " + " | ".join([f"`{name}`", method, *means, *ends]) + " |")
    return lines


def latents(results: dict[str, Any]) -> list[str]:
    """What stands for known latents, a row a toy, method and latent; lists are over seeds."""
    lines = ["| toy | method | latent | subcomponent | overlap | shuffled |", "| --- " * 6 + "|"]
    for name, methods in results.items():
        for method, own in methods.items():
            for latent, found in own.get("latents", {}).items():
                cells = [f"`{name}`", method, f"`{latent}`", ", ".join(f"`{c}`" for c in found["subcomponent"])]
                lines.append(
                    "| " + " | ".join([*cells, *(_list(found[key], 2) for key in ("overlap", "chance"))]) + " |"
                )
    return lines


def needed(results: dict[str, Any]) -> list[str]:
    """Where sites are needed, a row a toy and site and columns for each method; ranges are over seeds."""
    lines = []
    for name, methods in results.items():
        methods = {method: own["needed"] for method, own in methods.items() if own.get("needed")}
        if not methods:
            continue
        columns = [f"{method}: {key}" for method in methods for key in ("overlap (shuffled)", "here", "elsewhere")]
        lines += [f"| `{name}` | tokens | {' | '.join(columns)} |", "| --- " * (len(columns) + 2) + "|"]
        for site, first in next(iter(methods.values())).items():
            cells = [f"`{site}`", f"{100 * first['tokens'][0]:.0f}%"]
            for own in (found[site] for found in methods.values()):
                cells.append(f"{_range(own['overlap'], 2)} ({_range(own['chance'], 2)})")
                cells += [_range(own[key], 1) for key in ("here", "elsewhere")]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _range(values: list[float], digits: int) -> str:
    """The smallest and the largest, or one where they read the same."""
    ends = [f"{v:.{digits}f}" for v in (min(values), max(values))] if values else [""]
    return ends[0] if ends[0] == ends[-1] else f"{ends[0]} to {ends[-1]}"


def _list(values: list[Any], digits: int | None = None) -> str:
    return ", ".join(str(v) if digits is None else f"{v:.{digits}f}" for v in values)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--picture", nargs=2, metavar=("TOY", "SEED"))
    parser.add_argument("--out", type=Path, default=Path("ground_truth.png"))
    arguments = parser.parse_args()
    if arguments.picture is None:
        results = read(arguments.results)
        for table in (rows, distances, needed, latents):
            print("\n".join([*table(results), ""]))
        return
    name, seed = arguments.picture
    toy, model = TOYS[name], target_of(name, 0, arguments.work)
    (folder,) = arguments.work.glob(f"{name}-vpd-{seed}-target0-*/decomposition")
    found, truth = RankOne(Decomposition.load(folder), model), toy.truth(model)
    figure = (
        needed_picture(found, truth)
        if truth.needed
        else ground_truth(found, model, truth, toy.batches(64, seed=-3).at(0))
    )
    figure.savefig(arguments.out)


if __name__ == "__main__":
    main()
