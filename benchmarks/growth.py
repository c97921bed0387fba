"""How a training step's time and memory grow with subcomponents, tokens, layers and sites, beside what shapes alone predict.

    python -m benchmarks.growth                      # writes benchmarks/results/growth.json (six minutes)

From a base size (2 layers, d_model 128, 4 x 64 tokens) one thing is changed at a time. Each setting runs in a separate process:
``seconds`` (of the processor, one thread, median of steps) and ``peak_mb`` (above what imports take), and the GFLOP and MB that
``tl_vpd.planning.footprint`` predicts from shapes alone.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from typing import Any

import torch

from benchmarks import harness
from benchmarks.models import SITES, Size, config_of, trainer_step

BASE = Size(128, 512, 512, 4, 64, (128, 128, 256, 256, 512, 512), 128, 512)
QUERIES_KEYS, ATTENTION, EVERY = SITES[:2], SITES[:4], SITES

Setting = tuple[Size, tuple[str, ...]]


def settings() -> dict[str, dict[str, Setting]]:
    """What is changed, and to what."""

    def at(sites: tuple[str, ...] = EVERY, **changes: Any) -> Setting:
        return replace(BASE, **changes), sites

    return {
        "C": {f"x {f:g}": at(C=tuple(int(f * C) for C in BASE.C)) for f in (0.5, 1, 2, 4)},
        "tokens": {f"{n} x {BASE.context}": at(batch=n) for n in (2, 4, 8, 16)},
        "positions": {f"{BASE.batch} x {n}": at(context=n) for n in (32, 64, 128, 256)},
        "layers": {str(n): at(layers=n) for n in (1, 2, 4, 8)},
        "sites": {"Q, K": at(QUERIES_KEYS), "attention": at(ATTENTION), "all": at()},
    }


def measure(setting: Setting, steps: int) -> dict[str, float]:
    """Seconds and peak memory of this process's steps, and the prediction."""
    from tl_vpd.training import Trainer  # noqa: F401 (imports are not part of it)

    size, sites = setting
    before = harness.peak_mb()
    step = trainer_step(size, sites=sites)
    seconds = [harness.seconds_of(step, time.process_time) for _ in range(steps + 3)][3:]
    peak = harness.peak_mb() - before
    return {"seconds": round(statistics.median(seconds), 4), "peak_mb": round(peak, 1)} | predicted(size, sites)


def predicted(size: Size, sites: tuple[str, ...]) -> dict[str, float]:
    """GFLOP of a step's products and MB at its peak, from shapes."""
    from tl_vpd.planning import Target, TransformerShape, footprint

    shape = TransformerShape(
        layers=size.layers, d_model=size.d_model, heads=size.heads, d_mlp=size.d_mlp, vocabulary=size.vocabulary
    )
    needs = footprint(Target.of(shape), config_of(size, sites), context=size.context)
    return {"predicted_gflop": round(needs.step_flops / 1e9, 2), "predicted_mb": round(needs.total / 2**20, 1)}


def main() -> None:
    """Measures and writes the record."""
    parser = harness.parser("growth", __doc__)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--only", choices=list(settings()), help="change this alone")
    parser.add_argument("--one", nargs=2, metavar=("WHAT", "VALUE"), help="measure one setting in this process")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if arguments.one:
        what, value = arguments.one
        print(json.dumps(measure(settings()[what][value], arguments.steps)))
        return
    record: dict[str, Any] = {}
    for what in [arguments.only] if arguments.only else settings():
        for value in settings()[what]:
            command = [sys.executable, "-m", "benchmarks.growth", "--steps", str(arguments.steps), "--one", what, value]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            record.setdefault(what, {})[value] = json.loads(output.splitlines()[-1])
            print(what, value, record[what][value], flush=True)
    harness.write(arguments.out, record, "growth", base="2 layers, d_model 128, 4 x 64 tokens")


if __name__ == "__main__":
    main()
