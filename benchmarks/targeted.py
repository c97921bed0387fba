"""Targeted decomposition on toys with known truth, beside the naive one.

    python -m benchmarks.targeted                          # benchmarks/results/targeted.json, minutes of one core
    python -m benchmarks.targeted --cases compressed       # 1,000 dimensions: longer

Each case is a toy and the features that are its target. Figures: subcomponents important for the target by site, for how many
other features any is important, steps beside those of the whole decomposition, and, with Δ on and the target's subcomponents
ablated, the squared error on ordinary data. Cases in the file are kept; ``benchmarks.targeted_bundled`` and
``benchmarks.targeted_fact`` write others.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks import harness
from benchmarks.targeted_toys import features_report, streams, targeted_recipe
from benchmarks.toys import WORK, target_of
from tl_vpd.evaluation import nontarget
from tl_vpd.toys import TOYS, recipe
from tl_vpd.training import decompose_targeted

CASES = {
    "tms one feature": ("tms_5_2_id", (1,)),
    "tms three features": ("tms_5_2_id", (0, 1, 2)),
    "compressed": ("compressed", (0, 1, 2)),
}
DEFAULT = ("tms one feature", "tms three features")


def measured(name: str, features: tuple[int, ...], *, seed: int, steps: int | None, naive: bool) -> dict[str, Any]:
    """The figures of one run."""
    toy, model = TOYS[name], target_of(name, 0, WORK)
    config = targeted_recipe(name, seed=seed, steps=steps, naive=naive)
    start = time.process_time()
    run = decompose_targeted(model, *streams(toy, features, config.batch_size, seed=seed), config, progress=False)
    table = features_report(run.decomposition, model, toy, features)
    elsewhere = nontarget(run.decomposition, model, {"ordinary": toy.batches(64, seed=-3).at(0)}).loc["ordinary"]
    return {
        "features": list(features),
        "sites": table.reset_index().to_dict("records"),
        "ablated_elsewhere": float(elsewhere.loc["ablated", "distance"]),
        "stochastic": float(run.history["stochastic"].iloc[-1]),
        "steps": config.steps,
        "steps_of_the_whole": recipe(name, "vpd").steps,
        "cpu_seconds": round(time.process_time() - start, 1),
    }


def main() -> None:
    """The command."""
    parser = harness.parser("targeted", __doc__)
    parser.add_argument("--cases", nargs="+", default=list(DEFAULT), choices=list(CASES), help="which cases")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the decompositions")
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = harness.read(options.out)
    for case in options.cases:
        for seed in options.seeds:
            for kind in ("targeted", "naive"):
                results = record.setdefault(case, {}).setdefault(kind, {})
                if str(seed) in results:
                    continue
                results[str(seed)] = measured(*CASES[case], seed=seed, steps=options.steps, naive=kind == "naive")
                record.pop("settings", None)
                harness.write(options.out, record, "targeted")


if __name__ == "__main__":
    main()
