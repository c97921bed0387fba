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


def rows(results: dict[str, Any]) -> list[str]:
    """The table in Markdown, a row a toy and method; lists are over seeds."""
    lines = ["| toy | method | seeds | MMCS | ML2R | alive (true) | pattern errors | minutes |", "| --- " * 8 + "|"]
    for name, methods in results.items():
        for method, own in methods.items():
            alive = "; ".join(f"`{site}` {_list(own['alive'][site])} ({n})" for site, n in own["true"].items())
            errors = [int(sum(e)) for e in zip(*own["by_site"].get("pattern_errors", {}).values(), strict=True)]
            minutes = _list([round(s / 60) for s in own["seconds"]])
            found = [_list(own.get(key, []), digits) for key, digits in (("mmcs", 5), ("ml2r", 4))]
            cells = [f"`{name}`", method, _list(own["seed"]), *found, alive, _list(errors), minutes]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def latents(results: dict[str, Any]) -> list[str]:
    """The table of what stands for known latents, a row a toy, method, seed and latent."""
    lines = ["| toy | method | seed | latent | subcomponent | overlap | shuffled |", "| --- " * 7 + "|"]
    for name, methods in results.items():
        for method, own in methods.items():
            for latent, found in own.get("latents", {}).items():
                for i, seed in enumerate(own["seed"]):
                    numbers = f"{found['overlap'][i]:.2f} | {found['chance'][i]:.2f}"
                    lines.append(
                        f"| `{name}` | {method} | {seed} | `{latent}` | `{found['subcomponent'][i]}` | {numbers} |"
                    )
    return lines


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
        print("\n".join([*rows(results), "", *latents(results)]))
        return
    name, seed = arguments.picture
    toy, model = TOYS[name], target_of(name, 0, arguments.work)
    (folder,) = arguments.work.glob(f"{name}-vpd-{seed}-target0-*/decomposition")
    found = RankOne(Decomposition.load(folder), model)
    ground_truth(found, model, toy.truth(model), toy.batches(64, seed=-3).at(0)).savefig(arguments.out)


if __name__ == "__main__":
    main()
