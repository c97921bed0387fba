"""Training on one GPU: steps a second, memory and the share of the device's peak, at the paper's model and batch.

    make gpu                          # the tests marked gpu, then this; ends within ten minutes
    python -m benchmarks.gpu          # benchmarks/results/gpu.json

The variants ``NAMES`` in turn, as long as there is time: the paper's recipe and the merged one, uncompiled and compiled, with
products in bfloat16. ``peak_share`` is the matrix products of a step (``tl_vpd.planning``) over what the device computes in that
time at its peak, which is looked up by its name (``PEAKS``; where it is not there, the rate of its large products is timed).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks import harness
from benchmarks.models import SIZES, VARIANTS, Size, config_of, trainer_step

NAMES = ("bfloat16", "merged_bfloat16", "compiled_bfloat16", "compiled_merged_bfloat16")
PEAKS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "4090": 165.0}
"""10¹² FLOP of dense products in bfloat16 per second, as the manufacturer says."""
MINUTES = 9.0
STEPS = 10
SIDE = 8192
"""Of the products that are timed."""


def main() -> None:
    """Runs the benchmark; says so where there is no GPU."""
    parser: argparse.ArgumentParser = harness.parser("gpu", __doc__)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="after which no variant is begun")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("There is no GPU that this PyTorch can use: nothing was measured.")
    record = measure(SIZES["L"], torch.device("cuda"), minutes=arguments.minutes)
    harness.write(arguments.out, record, "gpu", size="L", steps=STEPS)


def measure(size: Size, device: torch.device, *, minutes: float, steps: int = STEPS) -> dict[str, Any]:
    """Figures by variant.

    Args:
        size: of model, decomposition and batch.
        device: where.
        minutes: after which no variant is begun.
        steps: that are timed.
    """
    peak, end = peak_tflops(device), time.monotonic() + 60 * minutes
    record: dict[str, Any] = {"peak_tflops": peak}
    for name in NAMES:
        if time.monotonic() < end:
            record[name] = of_variant(size, name, device, peak, steps)
    record["left_out"] = [name for name in NAMES if name not in record]
    return record


def of_variant(size: Size, name: str, device: torch.device, peak: float, steps: int) -> Mapping[str, Any]:
    """One variant's figures; why there are none, where it fails."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        start = time.perf_counter()
        step = trainer_step(size, name, device=device)
        first = harness.seconds_of(step)
        seconds = [harness.seconds_of(step) for _ in range(steps)]
    except (RuntimeError, ValueError) as error:  # among them: out of memory, no compiler
        return {"failed": str(error).strip().splitlines()[0]}
    median = statistics.median(seconds)
    return {
        "steps_per_s": 1 / median,
        "first_step_s": first,
        "total_s": time.perf_counter() - start,
        "peak_share": flops_of(size, name) / median / (peak * 1e12),
        "peak_gb": torch.cuda.max_memory_allocated(device) / 1e9 if on_gpu else harness.peak_mb() / 1e3,
    }


def flops_of(size: Size, name: str) -> float:
    """FLOP of the matrix products in a step."""
    from tl_vpd.planning import Target, TransformerShape, footprint

    shape = TransformerShape(
        layers=size.layers, d_model=size.d_model, heads=size.heads, d_mlp=size.d_mlp, vocabulary=size.vocabulary
    )
    return footprint(Target.of(shape), config_of(size, **VARIANTS[name][0]), context=size.context).step_flops


def peak_tflops(device: torch.device) -> float:
    """10¹² FLOP of products in bfloat16 that a device computes per second at best."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, peak in PEAKS.items():
            if part in name:
                return peak
    side = SIDE if device.type == "cuda" else SIDE // 64
    a = torch.ones(side, side, device=device, dtype=torch.bfloat16)
    return 2 * side**3 / statistics.median(harness.seconds_of(lambda: a @ a) for _ in range(7)) / 1e12


if __name__ == "__main__":
    main()
