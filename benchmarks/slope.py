"""Does a slope below 0 in the squashing that makes masks split W_out of compressed computation?

    python -m benchmarks.slope --method vpd                     # benchmarks/results/slope.json; about 12 minutes a run
    python -m benchmarks.slope --method spd --steps 10000       # about 9

SPD's masks may be negative (``forward_slope`` 0.01), VPD's not (0). A run for each importance coefficient and slope, all else as
in the method's recipe for the toy, seed 0. With one feature on at a time: how many pieces of W_out are important for it (above
0.1), how many pieces ever are, and how many of those for that feature alone. A row stands in the file until it is deleted.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import machine
from tl_vpd.baselines import METHODS
from tl_vpd.evaluation.ground_truth import TOLERANCE, ground_truth
from tl_vpd.toys import TOYS, recipe
from tl_vpd.toys.run import ROWS, WORK, target_of

RESULT = Path(__file__).parent / "results" / "slope.json"
OUT = "layers.0.W_out"


def row(name: str, method: str, importance: float, slope: float, steps: int | None, compile: bool) -> dict[str, Any]:
    """One run and what became of W_in and W_out."""
    toy, model, own = TOYS[name], target_of(name, 0, WORK), recipe(name, method, steps=steps)
    coefficients = own.coefficients.model_copy(update={"importance": importance})
    config = own.model_copy(update={"coefficients": coefficients, "forward_slope": slope})
    folder = WORK / f"{name}-{method}-0-{importance:g}-{slope:g}-{config.steps}"
    data = toy.batches(config.batch_size, seed=0)
    found = METHODS[method].run(model, data, config, out=folder, progress=False, compile=compile)
    truth = toy.truth(model)
    result = ground_truth(found, model, truth, toy.batches(ROWS, seed=-3).at(0), output=toy.output)
    sites = result.sites.set_index("site")
    on = found.importances(truth.probe)[OUT].flatten(0, 1) > TOLERANCE
    each, features = on.sum(1).float(), on.sum(0)
    return {
        "toy": name,
        "method": method,
        "importance": importance,
        "forward_slope": slope,
        "steps": config.steps,
        "mmcs": round(float(sites["mmcs"].dropna().mean()), 5),
        "W_in_errors": int(sites["pattern_errors"].iloc[0]),
        "W_out_pieces": int((features > 0).sum()),
        "W_out_for_one_feature_alone": int((features == 1).sum()),
        "W_out_per_feature": [int(each.min()), float(each.median()), int(each.max())],
        "stochastic": float(f"{result.reconstruction['stochastic']:.3g}"),
        "adversarial": float(f"{result.reconstruction['adversarial']:.3g}"),
    }


def main() -> None:
    """Measures what the file does not have, and writes it there run by run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", default="compressed_200", choices=["compressed", "compressed_200"])
    parser.add_argument("--method", default="vpd", choices=["vpd", "spd"])
    parser.add_argument("--importance", nargs="+", type=float, default=[1e-4, 1e-3])
    parser.add_argument("--slopes", nargs="+", type=float, default=[0.0, 0.01])
    parser.add_argument("--steps", type=int, help="in the place of the recipe's")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULT)
    own = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, Any] = json.loads(own.out.read_text(encoding="utf-8")) if own.out.is_file() else {"runs": []}
    for importance, slope in product(own.importance, own.slopes):
        steps = own.steps or recipe(own.toy, own.method).steps
        asked = (own.toy, own.method, importance, slope, steps)
        if asked in {(r["toy"], r["method"], r["importance"], r["forward_slope"], r["steps"]) for r in record["runs"]}:
            continue
        record["runs"].append(row(own.toy, own.method, importance, slope, own.steps, not own.no_compile))
        record["settings"] = {"command": "python -m benchmarks.slope", **machine()}
        own.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        print(json.dumps(record["runs"][-1]), flush=True)


if __name__ == "__main__":
    main()
