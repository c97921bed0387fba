"""How a training step's time and memory grow with subcomponents, tokens, layers and sites, beside what shapes alone predict.

    python -m benchmarks.growth                      # writes benchmarks/results/growth.json (a few minutes on two cores)

From a base size (2 layers, d_model 128, 4 x 64 tokens) one thing is changed at a time. Each setting has a process of its own:
``seconds`` (median of steps) and ``peak_mb`` (above what imports take), and the GFLOP and MB that
``tl_vpd.planning.footprint`` predicts from shapes alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.step import SITES, Size, high_water, own_step
from benchmarks.timing import machine

RESULT = Path(__file__).parent / "results" / "growth.json"
BASE = Size(128, 512, 512, 4, 64, (128, 128, 256, 256, 512, 512), 128, 512, float("nan"))
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
    before = high_water()
    step = own_step(size, sites=sites)
    taken = []
    for _ in range(steps + 3):
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
    found = {"seconds": round(statistics.median(taken[3:]), 4), "peak_mb": round((high_water() - before) / 1024, 1)}
    return found | predicted(size, sites)


def predicted(size: Size, sites: tuple[str, ...]) -> dict[str, float]:
    """GFLOP of a step's products and MB at its peak, from shapes."""
    from tl_vpd.planning.footprint import footprint, transformer
    from tl_vpd.training import VPDConfig

    target = transformer(
        layers=size.layers, d_model=size.d_model, heads=size.heads, d_mlp=size.d_mlp, vocabulary=size.vocabulary
    )
    config = VPDConfig(
        batch_size=size.batch,
        sites=sites,
        C={name: C for name, C in zip(SITES, size.C, strict=True) if name in sites},
        gamma={"d_ci": size.d_gamma, "d_mlp": size.d_gamma_mlp, "n_blocks": size.blocks, "n_heads": 4},
    )
    found = footprint(target, config, context=size.context)
    return {"predicted_gflop": round(found.step_flops / 1e9, 2), "predicted_mb": round(found.total / 2**20, 1)}


def main() -> None:
    """Measures and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--one", nargs=2, metavar=("WHAT", "VALUE"), help="measure one setting in this process")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.one:
        what, value = arguments.one
        print(json.dumps(measure(settings()[what][value], arguments.steps)))
        return
    record: dict[str, Any] = {}
    for what, values in settings().items():
        for value in values:
            command = [sys.executable, "-m", "benchmarks.growth", "--steps", str(arguments.steps), "--one", what, value]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            record.setdefault(what, {})[value] = json.loads(done.stdout.splitlines()[-1])
            print(what, value, record[what][value], flush=True)
    record["settings"] = {
        "command": "python -m benchmarks.growth",
        "base": "2 layers, d_model 128, 4 x 64 tokens",
        "transformer_lens": version("transformer_lens"),
        "torch_threads": torch.get_num_threads(),
        **machine(),
    }
    arguments.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
