"""Tables and pictures of docs/evidence.md from the measurements of ``python -m benchmarks.toys``.

python -m benchmarks.evidence                                     # the tables of benchmarks/results/ground_truth.json
python -m benchmarks.evidence --picture tms_5_2 0 --out docs/tms_5_2.png      # from the run in build/toys
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.toy_results import PUBLISHED, RESULTS, read
from benchmarks.toys import WORK, target_of
from tl_vpd.baselines import RankOne
from tl_vpd.decomposition import Decomposition
from tl_vpd.toys import TOYS
from tl_vpd.viz.ground_truth import ground_truth
from tl_vpd.viz.ground_truth import needed as needed_picture


def rows(results: dict[str, Any]) -> list[str]:
    """Sites whose content is known, in Markdown: one row per toy, method and site; ranges and lists are over seeds."""
    columns = "toy | method | seeds | site | MMCS | ML2R | alive (true) | count errors | pattern errors | minutes"
    lines = [f"| {columns} |", "| --- " * 10 + "|"]
    for name, methods in results.items():
        for method, figures in methods.items():
            by_site = figures["by_site"]
            for number, (site, true) in enumerate(figures["true"].items()):
                values = {key: by_site.get(key, {}).get(site, []) for key in by_site}
                first = [f"`{name}`", method, str(len(figures["seed"]))] if number == 0 else [""] * 3
                minutes = _list([round(s / 60) for s in figures["seconds"]]) if number == 0 else ""
                alive = f"{_list(figures['alive'][site])} ({true})"
                counts, patterns = (
                    _list([int(v) for v in values.get(f"{key}_errors", [])]) for key in ("count", "pattern")
                )
                entries = int(values["pattern_entries"][0])
                cells = [*first, f"`{site}`", _range(values["mmcs"], 5), _range(values["ml2r"], 4), alive, counts]
                lines.append("| " + " | ".join([*cells, f"{patterns} of {entries:,}", minutes]) + " |")
            scores = PUBLISHED.get(name, {}).get(method)
            if scores is not None:
                mmcs, ml2r = ("{:.3f} ± {:.3f}".format(*scores[key]) for key in ("mmcs", "ml2r"))
                lines.append(f"| `{name}` | {method}, published |  | `embed` | {mmcs} | {ml2r} |  |  |  |  |")
    return lines


def distances(results: dict[str, Any]) -> list[str]:
    """Distances of outputs under masks, one row per toy and method: means over seeds, the adversary's largest."""
    columns = {
        "unmasked": "all subcomponents",
        "importances": "importances",
        "rounded": "rounded",
        "stochastic": "random",
    }
    lines = [f"| toy | method | {' | '.join(columns.values())} | adversary | none |", "| --- " * 8 + "|"]
    for name, methods in results.items():
        for method, figures in methods.items():
            values = figures["reconstruction"]
            means = [f"{sum(values[key]) / len(values[key]):.2g}" for key in columns]
            ends = [f"{max(values['adversarial']):.2g}", f"{values['zero'][0]:.2g}"]
            lines.append("| " + " | ".join([f"`{name}`", method, *means, *ends]) + " |")
    return lines


def latents(results: dict[str, Any]) -> list[str]:
    """Subcomponents of known latents, one row per toy, method and latent; lists are over seeds."""
    lines = ["| toy | method | latent | subcomponent | overlap | shuffled |", "| --- " * 6 + "|"]
    for name, methods in results.items():
        for method, figures in methods.items():
            for latent, values in figures.get("latents", {}).items():
                cells = [f"`{name}`", method, f"`{latent}`", ", ".join(f"`{c}`" for c in values["subcomponent"])]
                lines.append(
                    "| " + " | ".join([*cells, *(_list(values[key], 2) for key in ("overlap", "chance"))]) + " |"
                )
    return lines


def needed(results: dict[str, Any]) -> list[str]:
    """Where sites are needed, one row per toy and site with columns for each method; ranges are over seeds."""
    lines = []
    for name, methods in results.items():
        methods = {method: figures["needed"] for method, figures in methods.items() if figures.get("needed")}
        if not methods:
            continue
        columns = [f"{method}: {key}" for method in methods for key in ("overlap (shuffled)", "here", "elsewhere")]
        lines += [f"| `{name}` | tokens | {' | '.join(columns)} |", "| --- " * (len(columns) + 2) + "|"]
        for site, first in next(iter(methods.values())).items():
            cells = [f"`{site}`", f"{100 * first['tokens'][0]:.0f}%"]
            for values in (by_site[site] for by_site in methods.values()):
                cells.append(f"{_range(values['overlap'], 2)} ({_range(values['chance'], 2)})")
                cells += [_range(values[key], 1) for key in ("here", "elsewhere")]
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
    trained, truth = RankOne(Decomposition.load(folder), model), toy.truth(model)
    figure = (
        needed_picture(trained, truth)
        if truth.needed
        else ground_truth(trained, model, toy.batches(64, seed=-3).at(0), truth)
    )
    figure.savefig(arguments.out)


if __name__ == "__main__":
    main()
