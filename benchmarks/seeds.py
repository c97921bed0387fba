"""Is a decomposition the same from seed to seed, and does it split when more is built? On the bundled model.

    python -m benchmarks.seeds          # benchmarks/results/seeds.json: two hours on one core
    python -m benchmarks.seeds --whole  # both blocks, with the bundled recipe: longer

Runs: ``--seeds`` at the recipe's C, and ``--factors`` times C with the first seed. The recipe is that of
``benchmarks.recipes``, but started at random directions: neurons and head channels would be the same in every run. Recorded
for each run: built and alive subcomponents (mean importance > 1e-6), L0, KL, the union test of pairs; for all pairs of seeds
mean max cosines of alive subcomponents, and of frequent ones (mean importance > 0.05), beside random directions; for the
smallest C against every larger one the splitting share. Finished runs are read from ``--work``; a stopped one continues.
``--until`` starts no run after so many seconds.
"""

from __future__ import annotations

import math
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.recipes import config_of, rows_of
from scripts.site.tables import markdown
from tl_vpd import bundled
from tl_vpd.adapters import adapt
from tl_vpd.decomposition import Decomposition
from tl_vpd.evaluation import alive_subcomponents, consistency, feature_splitting, sampled, union_test
from tl_vpd.evaluation.feature_splitting import FACTORS
from tl_vpd.evaluation.importance_statistics import ALIVE
from tl_vpd.site import select
from tl_vpd.training import VPDConfig
from tl_vpd.training.config import counts_for

COSINES = ("U", "V", "rank_one", "split")
FREQUENT = 0.05
"""The mean importance above which a subcomponent is counted as frequent."""


def at_size(model: nn.Module, factor: float, *, steps: int, seed: int, whole: bool) -> VPDConfig:
    """The config of a run with a factor of C."""
    config = config_of("base", steps=steps, seed=seed, whole=whole)
    sites = adapt(model).sites
    counts = counts_for(config, {name: sites[name] for name in select(config.sites, list(sites))})
    return config.model_copy(
        update={"C": {name: round(factor * n) for name, n in counts.items()}, "init": "normal", "seed": seed}
    )


def figures(vpd: Decomposition, model: nn.Module, rows: Int[Tensor, "n pos"]) -> dict[str, Any]:
    """A run's figures on validation rows."""
    row = feature_splitting({"": vpd}, model, rows).drop(columns="alive_growth").iloc[0].to_dict()
    with sampled(vpd, model, rows) as sample:
        pairs = union_test(sample, sizes=(2,)).iloc[0]
    return {name: float(f"{value:.5g}") for name, value in {**row, **pairs[["kl_alone", "kl_union"]].to_dict()}.items()}


def means(
    one: Decomposition, other: Decomposition, model: nn.Module, rows: Int[Tensor, "n pos"], above: float = ALIVE
) -> dict[str, float]:
    """The means over sites of what two runs share, of subcomponents with a mean importance above a bound."""
    alive = tuple(alive_subcomponents(vpd, model, rows, above=above) for vpd in (one, other))
    mean = consistency(one, other, alive=(alive[0], alive[1])).loc["mean"]
    return {name: round(float(mean[name]), 4) for key in COSINES for name in (key, f"{key}_random")}


def tables(record: dict[str, Any]) -> dict[str, str]:
    """The tables of the page by name."""
    runs = [
        {
            "times C": f"{run['factor']:g}",
            "seed": str(run["seed"]),
            "built": f"{run['built']:,.0f}",
            "alive": f"{run['alive']:,.0f}",
            "L0": f"{run['l0']:.1f}",
            "KL, stochastic": f"{run['stochastic_kl']:.3f}",
            "rounded": f"{run['rounded_kl']:.3f}",
            "union of pairs (alone)": f"{run['kl_union']:.3f} ({run['kl_alone']:.3f})",
        }
        for run in record["runs"].values()
    ]
    shared = []
    for key, text in {"seeds": "seeds {}", "frequent": "seeds {}, frequent ones", "sizes": "C {}"}.items():
        for pair, of_pair in record[key].items():
            cells = {key: f"{of_pair[key]:.3f} ({of_pair[f'{key}_random']:.3f})" for key in COSINES[:3]}
            split = f"{of_pair['split']:.1%} ({of_pair['split_random']:.1%})"
            shared.append({"compared": text.format(pair), **cells, "split": split})
    return {"seeds_runs": markdown(runs), "seeds_shared": markdown(shared) if shared else ""}


def main() -> None:
    """The command."""
    parser = harness.parser("seeds", __doc__)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--factors", type=float, nargs="+", default=list(FACTORS))
    parser.add_argument("--whole", action="store_true", help="both blocks, the recipe's Γ and rows of 128 tokens")
    parser.add_argument("--until", type=float, default=math.inf, help="start no run after so many seconds")
    parser.add_argument("--work", type=Path, default=Path("build/seeds"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, start = bundled.model(), time.monotonic()
    training, validation = (rows_of(split, whole=options.whole) for split in ("training", "validation"))
    wanted = [(1.0, seed) for seed in options.seeds]
    wanted += [(factor, options.seeds[0]) for factor in options.factors if factor != 1]
    runs: dict[tuple[float, int], Decomposition] = {}
    for factor, seed in wanted:
        config = at_size(model, factor, steps=options.steps, seed=seed, whole=options.whole)
        folder = options.work / f"C-{factor:g}-seed-{seed}-{options.steps}{'-whole' if options.whole else ''}"
        if time.monotonic() - start < options.until or (folder / "decomposition").is_dir():
            runs[factor, seed] = harness.trained(model, training, config, folder)
    rows, sizes = validation[:32], sorted((factor, seed) for factor, seed in runs if seed == options.seeds[0])
    pairs = list(combinations([key for key in runs if key[0] == 1], 2))
    record = {
        "runs": {
            f"{f:g}, {s}": {"factor": f, "seed": s, **figures(vpd, model, rows)} for (f, s), vpd in sorted(runs.items())
        },
        "seeds": {f"{a[1]}, {b[1]}": means(runs[a], runs[b], model, rows) for a, b in pairs},
        "frequent": {f"{a[1]}, {b[1]}": means(runs[a], runs[b], model, rows, FREQUENT) for a, b in pairs},
        "sizes": {f"{sizes[0][0]:g}, {b[0]:g}": means(runs[sizes[0]], runs[b], model, rows) for b in sizes[1:]},
    }
    harness.write(options.out, record, "seeds", steps=options.steps, whole=options.whole, tokens=rows.numel())


if __name__ == "__main__":
    main()
