"""Into how many pieces does W_out of compressed computation come, and does a slope below 0 make it more?

    python -m benchmarks.w_out --method vpd                   # benchmarks/results/w_out.json; 25 minutes a run
    python -m benchmarks.w_out --method spd --steps 10000     # about 20
    python -m benchmarks.w_out --table                        # what the file holds, in Markdown

A run for each importance coefficient and each slope of the squashing that makes masks (``forward_slope``: SPD's masks may be
negative, with 0.01; VPD's not, with 0), all else as in the method's recipe for the toy, seed 0. With one feature on at a time:
how many pieces of W_out ever are important (above 0.1), how many for a feature, and how many for one feature alone; how near they
are to the neurons. A row stands in the file until it is deleted.
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

RESULT = Path(__file__).parent / "results" / "w_out.json"
IN, OUT = "layers.0.W_in", "layers.0.W_out"
TOY = "compressed"
KEY = ("method", "importance", "forward_slope", "steps")
COLUMNS = {
    **{name: name for name in ("method", "steps", "importance")},
    "forward_slope": "slope",
    "W_in_mmcs": "MMCS of W_in",
    "W_in_errors": "pattern errors of W_in",
    "W_out_pieces": "pieces of W_out",
    "W_out_per_feature": "for a feature",
    "W_out_for_one_feature_alone": "for one alone",
    "W_out_mmcs": "MMCS with neurons",
    "W_out_errors": "pattern errors of W_out",
    "importances": "error, importances as masks",
    "adversarial": "error, adversary",
}


def row(method: str, importance: float, slope: float, steps: int | None, compile: bool) -> dict[str, Any]:
    """One run and what became of W_in and W_out."""
    toy, model, own = TOYS[TOY], target_of(TOY, 0, WORK), recipe(TOY, method, steps=steps)
    coefficients = own.coefficients.model_copy(update={"importance": importance})
    sloped = {"forward_slope": slope} if method == "spd" else {}
    config = own.model_copy(update={"coefficients": coefficients, **sloped})
    # The recipe's own run is the one that ``tl_vpd.toys.run`` keeps.
    other = "" if config == own else f"-{importance:g}-{slope:g}"
    folder = WORK / f"{TOY}-{method}-0{other}-target0-{config.steps}"
    data = toy.batches(config.batch_size, seed=0)
    found = METHODS[method].run(model, data, config, out=folder, progress=False, compile=compile)
    truth = toy.truth(model)
    result = ground_truth(found, model, truth, toy.batches(ROWS, seed=-3).at(0), output=toy.output)
    sites = result.sites.set_index("site")
    on = found.importances(truth.probe)[OUT].flatten(0, 1) > TOLERANCE
    each, features = on.sum(1).float(), on.sum(0)
    return {
        **dict(zip(KEY, (method, importance, slope, config.steps), strict=True)),
        **{f"W_in_{key}": round(float(sites.loc[IN, key]), 5) for key in ("mmcs", "ml2r")},
        "W_in_errors": int(sites.loc[IN, "pattern_errors"]),
        **{f"W_out_{key}": round(float(sites.loc[OUT, key]), 5) for key in ("mmcs", "ml2r")},
        "W_out_errors": int(sites.loc[OUT, "pattern_errors"]),
        "W_out_pieces": int((features > 0).sum()),
        "W_out_for_one_feature_alone": int((features == 1).sum()),
        "W_out_per_feature": [int(each.min()), float(each.median()), int(each.max())],
        **{key: float(f"{value:.3g}") for key, value in result.reconstruction.items()},
    }


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows in Markdown."""
    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "| --- " * len(COLUMNS) + "|"]
    for own in sorted(rows, key=lambda r: (r["method"] != "vpd", r["importance"], -r["steps"], r["forward_slope"])):
        cells = (own[key] for key in COLUMNS)
        lines.append(
            "| " + " | ".join(", ".join(f"{v:g}" for v in c) if isinstance(c, list) else f"{c}" for c in cells) + " |"
        )
    return lines


def main() -> None:
    """Measures what the file does not have, and writes it there run by run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="vpd", choices=["vpd", "spd"])
    parser.add_argument("--importance", nargs="+", type=float, default=[1e-6, 1e-5, 1e-4, 1e-3])
    parser.add_argument("--slopes", nargs="+", type=float, default=[0.0, 0.01])
    parser.add_argument("--steps", type=int, help="in the place of the recipe's")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--table", action="store_true", help="print what the file holds and measure nothing")
    own = parser.parse_args()
    torch.set_num_threads(1)

    def read() -> dict[str, Any]:
        return json.loads(own.out.read_text(encoding="utf-8")) if own.out.is_file() else {"runs": []}

    if own.table:
        print("\n".join(table(read()["runs"])))
        return
    for importance, slope in product(own.importance, own.slopes):
        asked = (own.method, importance, slope, own.steps or recipe(TOY, own.method).steps)
        if asked in {tuple(r[key] for key in KEY) for r in read()["runs"]}:
            continue
        found = row(own.method, importance, slope, own.steps, not own.no_compile)
        record = read()  # another process may have written meanwhile
        record["runs"].append(found)
        record["settings"] = {"command": "python -m benchmarks.w_out", **machine()}
        own.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
