"""Ratios of run times on noisy machines: the variants run in turn, round after round, and the medians of rounds are compared."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping

import torch

Variant = Callable[[], object]


def seconds_in_turn(variants: Mapping[str, Variant], *, rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds of every variant in each round; a round runs each once, every other round in reverse order."""
    found: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants)
    for i in range(warm_up + rounds):
        for name in order if i % 2 else reversed(order):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            variants[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i >= warm_up:
                found[name].append(time.perf_counter() - start)
    return found


def ratio(seconds: Mapping[str, list[float]], name: str, base: str) -> float:
    """The median over rounds of this variant's time over the base's in the same round."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


def machine() -> dict[str, str | int]:
    """What the figures were measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "device": device,
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
