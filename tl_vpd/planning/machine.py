"""What a machine has: memory, and the rate of its matrix products, which is timed."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from tl_vpd.checks import check_fields, number
from tl_vpd.training.memory import machine_memory
from tl_vpd.training.precision import has_bfloat16

ROWS, WIDTH = 512, 768
"""The product that is timed is as large as those of a small model's step: ``[ROWS, WIDTH] @ [WIDTH, WIDTH]``."""
REPEATS, TIMES = 7, 8
SLOW = 0.5
"""Seconds of one product above which the others are not waited for."""


@dataclass(frozen=True)
class Machine:
    """What runs are planned for.

    Attributes:
        tflops: 10¹² FLOP of matrix products in float32 that a device computes per second.
        memory: bytes of a device (0: unknown).
        bfloat16: how many times as fast products in bfloat16 are (None: not known, or there are no instructions for them).
        timed: whether it is this machine, whose products were timed.
    """

    tflops: float
    memory: int = 0
    bfloat16: float | None = None
    timed: bool = False

    def __post_init__(self) -> None:
        check_fields(self, memory=0)
        number("tflops", self.tflops, above=0)
        if self.bfloat16 is not None:
            number("bfloat16", self.bfloat16, above=0)

    @classmethod
    def here(cls, device: torch.device | str = "cpu") -> Machine:
        """This machine, with one of its devices."""
        tflops = matrix_tflops(device)
        faster = matrix_tflops(device, torch.bfloat16) / tflops if has_bfloat16(device) else None
        return cls(tflops, machine_memory(device), faster, timed=True)


def matrix_tflops(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """10¹² FLOP of matrix products per second on a device: the median of a few short runs."""
    a, b = (torch.ones(n, WIDTH, device=device, dtype=dtype) for n in (ROWS, WIDTH))
    rates: list[float] = []
    for _ in range(REPEATS + 1):  # the first one warms up
        start = time.perf_counter()
        for _ in range(TIMES):
            product = a @ b
            if not rates and time.perf_counter() - start > SLOW:
                return 2 * ROWS * WIDTH * WIDTH / (time.perf_counter() - start) / 1e12
        float(product[0, 0])  # waits for the device
        rates.append(2 * ROWS * WIDTH * WIDTH * TIMES / (time.perf_counter() - start))
    return statistics.median(rates[1:]) / 1e12
