"""Do other sizes and other seeds give the same subcomponents of a toy?

    python -m benchmarks.stability                    # benchmarks/results/stability.json

*Sizes*: VPD with 0.5, 1, 2 and 4 times the recipe's C, seed 0: subcomponents built and alive, L0, distances. *Seeds*: mean
max cosines between the decompositions of all pairs of seeds, alive subcomponents alone, beside random directions, from the
runs that ``python -m benchmarks.toys`` has left in ``--work``. Sizes are trained there, and read where they are finished. The
file's figures of other toys stay.
"""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks import harness
from benchmarks.toys import ROWS, WORK, target_of
from tl_vpd.decomposition import Decomposition
from tl_vpd.evaluation.consistency import consistency
from tl_vpd.evaluation.feature_splitting import FACTORS, alive_subcomponents, decompose_at_sizes, feature_splitting
from tl_vpd.toys import TOYS, recipe
from tl_vpd.training import ExecutionConfig, SavingConfig


def of_sizes(name: str, work: Path, factors: list[float], *, compile: bool) -> dict[str, Any]:
    """One row per size."""
    toy, model, config = TOYS[name], target_of(name, 0, work), recipe(name, "vpd")
    data = toy.batches(config.batch_size, seed=0)
    folder = work / f"{name}-sizes"
    saving = SavingConfig(folder=folder, save_every=1_000, keep_states=1)
    execution = ExecutionConfig(compile=compile)
    runs = decompose_at_sizes(model, data, config, factors=factors, execution=execution, saving=saving, progress=False)
    return rounded(feature_splitting(runs, model, toy.batches(ROWS, seed=-3).at(0)))


def of_seeds(name: str, work: Path) -> dict[str, Any]:
    """One row per site, averaged over all pairs of seeds.

    Raises:
        FileNotFoundError: fewer than two seeds are there.
    """
    toy, model = TOYS[name], target_of(name, 0, work)
    steps = recipe(name, "vpd").steps
    folders = sorted(work.glob(f"{name}-vpd-*-target0-{steps}/decomposition"))
    if len(folders) < 2:
        raise FileNotFoundError(
            f"{work} has {len(folders)} runs of {name}, and two are needed: make more with python -m benchmarks.toys."
        )
    inputs = toy.batches(ROWS, seed=-3).at(0)
    runs = [Decomposition.load(folder) for folder in folders]
    alive = [alive_subcomponents(run, model, inputs) for run in runs]
    pairs = list(combinations(range(len(runs)), 2))
    tables = [consistency(runs[a], runs[b], alive=(alive[a], alive[b])) for a, b in pairs]
    mean = sum(table.drop(columns=["C", "C_other"]) for table in tables) / len(tables)
    return {"seeds": len(runs), "pairs": len(pairs), **rounded(pd.DataFrame(mean))}


def rounded(table: pd.DataFrame) -> dict[str, Any]:
    """A table as numbers with few digits, by row."""
    return {
        str(index): {str(column): float(f"{value:.5g}") for column, value in row.items()}
        for index, row in table.iterrows()
    }


def main() -> None:
    """Measures and writes the record."""
    parser = harness.parser("stability", __doc__)
    parser.add_argument("--toy", nargs="*", default=["tms_5_2"], help="whose sizes are trained")
    parser.add_argument(
        "--seeds-of", nargs="*", default=["tms_5_2", "tms_5_2_id", "tms_40_10"], help="whose seeds are compared"
    )
    parser.add_argument("--factors", nargs="+", type=float, default=list(FACTORS))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--work", type=Path, default=WORK)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    record = harness.read(arguments.out)
    for name in arguments.seeds_of:
        record.setdefault("seeds", {})[name] = of_seeds(name, arguments.work)
    for name in arguments.toy:
        rows = of_sizes(name, arguments.work, arguments.factors, compile=arguments.compile)
        record.setdefault("sizes", {})[name] = rows
    harness.write(arguments.out, record, "stability")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
