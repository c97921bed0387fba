"""What this machine has: memory, and the rate of its matrix products, timed; and what to change where a run asks for more."""

from __future__ import annotations

import os
import statistics
import time

import torch

ROWS, WIDTH = 512, 768
"""The product that is timed is as large as those of a small model's step: ``[ROWS, WIDTH] @ [WIDTH, WIDTH]``."""
REPEATS, TIMES = 7, 8
FITS = 0.8
"""The share of the memory that a run may be planned to take; the allocator and the system need the rest."""
LONG = 24 * 3600
"""Seconds above which a run counts as long."""


def matrix_tflops(device: torch.device | str = "cpu") -> float:
    """10¹² FLOP of matrix products in float32 per second on a device: the median of a few short runs."""
    a, b = torch.ones(ROWS, WIDTH, device=device), torch.ones(WIDTH, WIDTH, device=device)
    rates = []
    for _ in range(REPEATS + 1):  # the first one warms up
        start = time.perf_counter()
        for _ in range(TIMES):
            product = a @ b
        float(product[0, 0])  # waits for the device
        rates.append(2 * ROWS * WIDTH * WIDTH * TIMES / (time.perf_counter() - start))
    return statistics.median(rates[1:]) / 1e12


def machine_memory(device: torch.device | str = "cpu") -> int:
    """Bytes of memory of a GPU or of this machine (0: the system does not say)."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return 0


def advice(needed: int, available: int, seconds: float) -> list[str]:
    """What to change in a run that this machine is too small or too slow for.

    Args:
        needed: bytes at the step's peak.
        available: bytes of the machine (0: unknown).
        seconds: of the whole run, at the rate of its matrix products.
    """
    lines = []
    if available and needed > FITS * available:
        lines.append(
            f"The run needs {needed / 2**30:.1f} GiB and this machine has {available / 2**30:.1f}: run fewer rows at once "
            "(execution.micro_batch), lower C, or decompose one block (vpd.sites, such as 'blocks.5.*')."
        )
    if seconds > LONG:
        lines.append(
            f"The run takes {seconds / 3600:,.0f} h or more: decompose fewer blocks (passes start at the first decomposed one), "
            "or shorten it (vpd.steps, vpd.batch_size, data.context); vpd.merged, execution.compile and "
            "execution.precision='bfloat16' make a step faster, a GPU most of all."
        )
    return lines
