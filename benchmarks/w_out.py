"""Into how many subcomponents does W_out of compressed computation split, and does a slope below 0 make it more?

    python -m benchmarks.w_out --method vpd                   # benchmarks/results/w_out.json; 25 minutes per run
    python -m benchmarks.w_out --method spd --steps 10000     # about 20

One run per importance coefficient and, for SPD, per slope of the squashing that makes masks (``forward_slope``: with 0.01, as in
SPD's paper, masks may be negative), everything else as in the method's recipe for the toy, seed 0. With one feature on at a time:
how many subcomponents of W_out ever are important (above 0.1), how many for each feature, and how many for one feature alone; how
near they are to the neurons. A row stays in the file until it is deleted.
``python -m scripts.site.figures`` writes the table of docs/evidence.md.
"""

from __future__ import annotations

import json
from itertools import product
from typing import Any

import torch

from benchmarks import harness
from benchmarks.toys import ROWS, WORK, target_of
from tl_vpd.baselines import METHODS, SPDConfig
from tl_vpd.evaluation.ground_truth import ground_truth
from tl_vpd.evaluation.matching import TOLERANCE
from tl_vpd.toys import TOYS, recipe

IN, OUT = "layers.0.W_in", "layers.0.W_out"
TOY = "compressed"
KEY = ("method", "importance", "forward_slope", "steps")
COLUMNS = {
    **{name: name for name in ("method", "steps", "importance")},
    "forward_slope": "slope",
    "W_in_mmcs": "MMCS of W_in",
    "W_in_errors": "pattern errors of W_in",
    "W_out_pieces": "pieces of W_out",
    "W_out_per_feature": "per feature",
    "W_out_for_one_feature_alone": "for one alone",
    "W_out_mmcs": "MMCS with neurons",
    "W_out_errors": "pattern errors of W_out",
    "importances": "error, importances as masks",
    "adversarial": "error, adversary",
}


def run(method: str, importance: float, slope: float, steps: int | None, compile: bool) -> dict[str, Any]:
    """One run and what became of W_in and W_out."""
    toy, model, base = TOYS[TOY], target_of(TOY, 0, WORK), recipe(TOY, method, steps=steps)
    coefficients = base.coefficients.model_copy(update={"importance": importance})
    config = base.model_copy(update={"coefficients": coefficients})
    if slope:  # only SPD's config has one
        config = SPDConfig(**{**config.model_dump(), "forward_slope": slope})
    # The unchanged recipe's run is the one that ``benchmarks.toys`` has made.
    other = "" if config == base else f"-{importance:g}-{slope:g}"
    folder = WORK / f"{TOY}-{method}-0{other}-target0-{config.steps}"
    data = toy.batches(config.batch_size, seed=0)
    trained = METHODS[method].run(model, data, config, folder=folder, progress=False, compile=compile)
    truth = toy.truth(model)
    result = ground_truth(trained, model, toy.batches(ROWS, seed=-3).at(0), truth, output=toy.output)
    sites = result.sites.set_index("site")
    on = trained.importances(truth.probe)[OUT].flatten(0, 1) > TOLERANCE
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


def table(record: dict[str, Any]) -> list[dict[str, str]]:
    """The file's rows as texts."""
    rows = sorted(
        record["runs"], key=lambda r: (r["method"] != "vpd", r["importance"], -r["steps"], r["forward_slope"])
    )
    return [{title: _text(row[key]) for key, title in COLUMNS.items()} for row in rows]


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return value if isinstance(value, str) else f"{value:,g}" if value >= 1e3 else f"{value:.3g}"


def main() -> None:
    """Measures what the file does not have, and writes it there run by run."""
    parser = harness.parser("w_out", __doc__)
    parser.add_argument("--method", default="vpd", choices=["vpd", "spd"])
    parser.add_argument("--importance", nargs="+", type=float, default=[1e-6, 1e-5, 1e-4, 1e-3])
    parser.add_argument("--slopes", nargs="+", type=float, help="with --method spd (default: 0 and 0.01)")
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--no-compile", action="store_true")
    arguments = parser.parse_args()
    if arguments.slopes and arguments.method == "vpd":
        parser.error("--slopes belongs to --method spd: VPD's masks have no slope below 0")
    torch.set_num_threads(1)

    def runs() -> list[dict[str, Any]]:
        return list(harness.read(arguments.out).get("runs", []))

    steps = arguments.steps or recipe(TOY, arguments.method).steps
    slopes = [0.0] if arguments.method == "vpd" else arguments.slopes or [0.0, 0.01]
    for importance, slope in product(arguments.importance, slopes):
        if (arguments.method, importance, slope, steps) in {tuple(r[key] for key in KEY) for r in runs()}:
            continue
        figures = run(arguments.method, importance, slope, arguments.steps, not arguments.no_compile)
        # Read again: another process may have written meanwhile.
        harness.write(arguments.out, {"runs": [*runs(), figures]}, "w_out")
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
