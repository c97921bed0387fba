"""Do other sizes and other seeds find the same subcomponents of a toy?

    python -m benchmarks.stability                    # benchmarks/results/stability.json

*Sizes*: VPD with 0.5, 1, 2 and 4 times the recipe's C, seed 0: subcomponents built and alive, L0, distances. *Seeds*: mean max
cosines between the decompositions of all pairs of seeds, alive subcomponents alone, beside random directions; they are those that
``python -m tl_vpd.toys.run`` has left in ``--work``. Sizes are trained there, and read where they are finished. What the file
holds of other toys stays.
"""

from __future__ import annotations

import argparse
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks.timing import machine
from tl_vpd.decomposition import Decomposition
from tl_vpd.evaluation.consistency import consistency
from tl_vpd.evaluation.feature_splitting import FACTORS, alive_of, sizes, train_sizes
from tl_vpd.toys import TOYS, recipe
from tl_vpd.toys.run import ROWS, WORK, target_of
from tl_vpd.training import ExecutionConfig, SavingConfig

RESULT = Path(__file__).parent / "results" / "stability.json"


def of_sizes(name: str, work: Path, factors: list[float], *, compile: bool) -> dict[str, Any]:
    """A row a size."""
    toy, model, config = TOYS[name], target_of(name, 0, work), recipe(name, "vpd")
    data = toy.batches(config.batch_size, seed=0)
    folder = work / f"{name}-sizes"
    saving = SavingConfig(folder=folder, save_every=1_000, keep_states=1)
    execution = ExecutionConfig(compile=compile)
    found = train_sizes(model, data, config, factors=factors, execution=execution, saving=saving, progress=False)
    return plain(sizes(found, model, toy.batches(ROWS, seed=-3).at(0)))


def of_seeds(name: str, work: Path) -> dict[str, Any]:
    """A row a site, averaged over all pairs of seeds.

    Raises:
        FileNotFoundError: fewer than two seeds are there.
    """
    toy, model = TOYS[name], target_of(name, 0, work)
    steps = recipe(name, "vpd").steps
    folders = sorted(work.glob(f"{name}-vpd-*-target0-{steps}/decomposition"))
    if len(folders) < 2:
        raise FileNotFoundError(
            f"{work} holds {len(folders)} runs of {name}: make some with python -m tl_vpd.toys.run."
        )
    inputs = toy.batches(ROWS, seed=-3).at(0)
    found = [Decomposition.load(folder) for folder in folders]
    alive = [alive_of(own, model, inputs) for own in found]
    pairs = list(combinations(range(len(found)), 2))
    tables = [consistency(found[a], found[b], alive=(alive[a], alive[b])) for a, b in pairs]
    mean = sum(table.drop(columns=["C", "C_other"]) for table in tables) / len(tables)
    return {"seeds": len(found), "pairs": len(pairs), **plain(pd.DataFrame(mean))}


def plain(table: pd.DataFrame) -> dict[str, Any]:
    """A table as numbers with few digits, by row."""
    return {
        str(index): {str(column): float(f"{value:.5g}") for column, value in row.items()}
        for index, row in table.iterrows()
    }


def main() -> None:
    """Measures and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", nargs="*", default=["tms_5_2"], help="whose sizes are trained")
    parser.add_argument(
        "--seeds-of", nargs="*", default=["tms_5_2", "tms_5_2_id", "tms_40_10"], help="whose seeds are compared"
    )
    parser.add_argument("--factors", nargs="+", type=float, default=list(FACTORS))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--out", type=Path, default=RESULT)
    own = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, Any] = json.loads(own.out.read_text(encoding="utf-8")) if own.out.is_file() else {}
    for name in own.seeds_of:
        record.setdefault("seeds", {})[name] = of_seeds(name, own.work)
    for name in own.toy:
        record.setdefault("sizes", {})[name] = of_sizes(name, own.work, own.factors, compile=own.compile)
    record["settings"] = {"command": "python -m benchmarks.stability", **machine()}
    own.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
