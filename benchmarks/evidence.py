"""Tables and pictures of docs/evidence.md from the measurements of ``python -m benchmarks.toys``.

    python -m benchmarks.evidence --picture tms_5_2 0 --out docs/tms_5_2.png      # from the run in build/toys

``python -m scripts.site.figures`` writes the tables, from ``benchmarks/results/ground_truth.json``.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.toy_results import PUBLISHED
from benchmarks.toys import WORK, target_of
from tl_vpd.baselines import RankOne
from tl_vpd.decomposition import Decomposition
from tl_vpd.toys import TOYS
from tl_vpd.viz.ground_truth import ground_truth as ground_truth_picture
from tl_vpd.viz.ground_truth import needed as needed_picture

Record = dict[str, Any]
Rows = list[dict[str, str]]


def ground_truth(results: Record) -> Rows:
    """Sites whose content is known, a row per toy and method; ranges are over seeds and sites."""
    made: Rows = []
    for toy, methods in results.items():
        for method, figures in methods.items():
            if not figures["true"]:
                continue
            by_site, sites = figures["by_site"], figures["true"]
            counts = by_site.get("count_errors", {})
            made.append(
                {
                    "toy": f"`{toy}`",
                    "method": method,
                    "seeds": str(len(figures["seed"])),
                    "MMCS": _range([v for values in by_site["mmcs"].values() for v in values], 4),
                    "ML2R": _range([v for values in by_site["ml2r"].values() for v in values], 3),
                    "alive (true)": _by_site({site: figures["alive"][site] for site in sites}, " ({})", sites),
                    "count errors": _by_site(counts, "", {}),
                    "pattern errors": _by_site(
                        by_site["pattern_errors"],
                        " of {:,}",
                        {site: int(n[0]) for site, n in by_site["pattern_entries"].items()},
                    ),
                    "minutes": _range([s / 60 for s in figures["seconds"]], 0),
                }
            )
            if (scores := PUBLISHED.get(toy, {}).get(method)) is not None:
                published = {key.upper(): "{:.3f} ± {:.3f}".format(*scores[key]) for key in ("mmcs", "ml2r")}
                name = {"toy": f"`{toy}`", "method": f"{method}, published"}
                made.append({column: (name | published).get(column, "") for column in made[-1]})
    return made


def distances(results: Record) -> Rows:
    """Distances of outputs under masks, one row per toy and method: means over seeds, the adversary's largest."""
    columns = {
        "unmasked": "all subcomponents",
        "importances": "importances",
        "rounded": "rounded",
        "stochastic": "random",
    }
    made = []
    for toy, methods in results.items():
        for method, figures in methods.items():
            values = figures["reconstruction"]
            means = {title: f"{sum(values[key]) / len(values[key]):.2g}" for key, title in columns.items()}
            ends = {"adversary": f"{max(values['adversarial']):.2g}", "none": f"{values['zero'][0]:.2g}"}
            made.append({"toy": f"`{toy}`", "method": method, **means, **ends})
    return made


def latents(results: Record) -> Rows:
    """Subcomponents of known latents, one row per toy, method and latent; lists are over seeds."""
    return [
        {
            "toy": f"`{toy}`",
            "method": method,
            "latent": f"`{latent}`",
            "subcomponent": ", ".join(f"`{c}`" for c in values["subcomponent"]),
            "overlap": _list(values["overlap"], 2),
            "shuffled": _list(values["chance"], 2),
        }
        for toy, methods in results.items()
        for method, figures in methods.items()
        for latent, values in figures.get("latents", {}).items()
    ]


def needed(results: Record) -> Rows:
    """Where the weights of the induction circuit are needed, with columns for each method; ranges are over seeds."""
    methods = {method: figures["needed"] for method, figures in results["induction"].items() if figures.get("needed")}
    made = []
    for site, first in next(iter(methods.values())).items():
        cells = {"induction": f"`{site}`", "tokens": f"{first['tokens'][0]:.0%}"}
        for method, by_site in methods.items():
            values = by_site[site]
            overlap = f"{_range(values['overlap'], 2)} ({_range(values['chance'], 2)})"
            cells |= {f"{method}: overlap (shuffled)": overlap}
            cells |= {f"{method}: {key}": _range(values[key], 1) for key in ("here", "elsewhere")}
        made.append(cells)
    return made


def stability_sizes(results: Record) -> Rows:
    """The induction circuit with more and fewer subcomponents."""
    return [
        {
            "times C": f"{float(factor):g}",
            "built": f"{row['built']:,.0f}",
            "alive": f"{row['alive']:,.0f}",
            "important per token": f"{row['l0']:.1f}",
            "random masks, nats": f"{row['stochastic_kl']:.4f}",
            "rounded masks, nats": f"{row['rounded_kl']:.4f}",
        }
        for factor, row in results["sizes"]["induction"].items()
    ]


def stability_seeds(results: Record) -> Rows:
    """What seeds share: mean largest cosines of rank-one matrices, beside random directions'; a transformer's sites together."""
    made = []
    for toy, figures in results["seeds"].items():
        sites = {site: values for site, values in figures.items() if isinstance(values, dict) and site != "mean"}
        shown = sites if toy.startswith("tms") else {"mean of its weights": figures["mean"]}
        for site, values in shown.items():
            cosine = f"{values['rank_one']:.3f} ({values['rank_one_random']:.2f})"
            made.append({"toy": f"`{toy}`", "seeds": str(figures["seeds"]), "site": site, "cosine (random)": cosine})
    return made


OF_TOYS = (ground_truth, distances, latents, needed)
"""Tables of ``benchmarks/results/ground_truth.json``."""
OF_STABILITY = (stability_sizes, stability_seeds)
"""Tables of ``benchmarks/results/stability.json``."""


def _by_site(values: Mapping[str, list[float]], of: str, true: Mapping[str, int]) -> str:
    """Each site's range over seeds, and what it is of."""
    return "; ".join(_range(numbers, 0) + of.format(true.get(site, 0)) for site, numbers in values.items())


def _range(values: list[float], digits: int) -> str:
    """The smallest and the largest, or one where they read the same."""
    ends = [f"{v:.{digits}f}" for v in (min(values), max(values))] if values else [""]
    return ends[0] if ends[0] == ends[-1] else f"{ends[0]} to {ends[-1]}"


def _list(values: list[float], digits: int) -> str:
    return ", ".join(f"{v:.{digits}f}" for v in values)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--picture", nargs=2, metavar=("TOY", "SEED"), required=True)
    parser.add_argument("--out", type=Path, default=Path("ground_truth.png"))
    arguments = parser.parse_args()
    name, seed = arguments.picture
    toy, model = TOYS[name], target_of(name, 0, arguments.work)
    (folder,) = arguments.work.glob(f"{name}-vpd-{seed}-target0-*/decomposition")
    trained, truth = RankOne(Decomposition.load(folder), model), toy.truth(model)
    figure = (
        needed_picture(trained, truth)
        if truth.needed
        else ground_truth_picture(trained, model, toy.batches(64, seed=-3).at(0), truth)
    )
    figure.savefig(arguments.out)


if __name__ == "__main__":
    main()
