"""Seconds and memory of a training step, beside the method on one page (``tl_vpd.training.reference``) in the same run.

    python -m benchmarks.step                        # writes benchmarks/results/step.json (about half an hour on two cores)

The trainer and the reference take turns, each in a separate process (the trainer's keeps freed memory, as ``tl-vpd train``
does). For each size: ``trainer_s`` and ``reference_s`` (medians of rounds), ``ratio`` (reference over trainer, median over
rounds), ``operators`` (calls in a step, those inside others too, as torch's profiler counts them), ``executed_gflop`` (matrix
products, as torch counts them without ``addmm_``), ``floor_s`` (the mathematics' matrix products at this machine's rate of large
float32 products in the same run), ``floor_share`` (floor over trainer).

In new processes: ``peak_mb`` and ``reference_peak_mb`` (above what imports take; ``settled_mb`` without the first steps, in which
compiled passes are made), ``first_step_s`` and ``first_step_cpu_s`` (by the clock, and of all processors with making the
trainer). Compiled ones begin with PyTorch's cache empty, and run again with what is in it then (``cached``).

The same for the other ``VARIANTS`` of ``benchmarks.models``, under their names; ``checkpoint`` has memory and the first step
alone, and all have with ``--rounds 0``. ``--sizes V`` is M with the vocabulary of GPT-2, where logits are made in blocks, beside
``whole_logits``. ``--variants compiled`` measures that and the paper's recipe alone. Size L needs a GPU.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import harness
from benchmarks.models import SIZES, VARIANTS, reference_step, trainer_step

REFERENCE = "reference"


def step_of(size: str, which: str) -> Callable[[], object]:
    """A step of the reference, or of a variant of the trainer."""
    if which == REFERENCE:
        return reference_step(SIZES[size])
    from tl_vpd.training.memory import keep_freed_memory

    keep_freed_memory()
    return trainer_step(SIZES[size], which)


class Worker:
    """A process that carries out steps when told to."""

    def __init__(self, size: str, which: str) -> None:
        self.pipe, other = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self.process = context.Process(target=work, args=(size, which, other), daemon=True)
        self.process.start()

    def ask(self, what: str) -> float:
        """Seconds of a ``step``, or its matrix products (``flop``) or calls of operators (``operators``)."""
        self.pipe.send(what)
        return float(self.pipe.recv())

    def stop(self) -> None:
        """Ends the process."""
        self.pipe.send("stop")
        self.process.join()


def work(size: str, which: str, pipe: Connection) -> None:
    """What a worker's process runs."""
    warnings.simplefilter("ignore")
    step = step_of(size, which)
    while (what := pipe.recv()) != "stop":
        if what == "flop":
            with FlopCounterMode(display=False) as counter:
                step()
            pipe.send(counter.get_total_flops())
        elif what == "operators":
            with profile(activities=[ProfilerActivity.CPU]) as profiled:
                step()
            pipe.send(len(profiled.events()))
        else:
            pipe.send(harness.seconds_of(step))


def gemm_rate(rounds: int = 5) -> float:
    """This machine's FLOP per second in large float32 products."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 4096)
    seconds = harness.seconds_in_turn({"product": lambda: [a @ b for _ in range(5)]}, rounds=rounds)["product"]
    return 5 * 2 * 1024 * 1024 * 4096 / statistics.median(seconds)


def measure(name: str, rounds: int, variants: Sequence[str]) -> dict[str, dict[str, float]]:
    """Seconds, ratio and fraction of the floor by variant; each has a turn in every round."""
    size = SIZES[name]
    names = [*variants, *([REFERENCE] if size.has_reference else [])]
    workers = {which: Worker(name, which) for which in names}
    for worker in workers.values():  # all have started before anything is timed
        worker.ask("step")
    rates = [gemm_rate()]
    seconds: dict[str, list[float]] = {which: [] for which in names}
    for i in range(rounds + 2):
        for which in names if i % 2 else reversed(names):
            step_s = workers[which].ask("step")
            if i >= 2:
                seconds[which].append(step_s)
    rates.append(gemm_rate())
    figures: dict[str, dict[str, float]] = {}
    for which in variants:
        median, executed = statistics.median(seconds[which]), workers[which].ask("flop")
        figures[which] = {
            "trainer_s": round(median, 4),
            "operators": round(workers[which].ask("operators")),
            "executed_gflop": round(executed / 1e9, 1),
        }
        if size.has_reference:
            floor = size.needed * 1e9 / max(rates)
            figures[which] |= {
                "reference_s": round(statistics.median(seconds[REFERENCE]), 4),
                "ratio": round(harness.ratio(seconds, REFERENCE, which), 3),
                "floor_s": round(floor, 4),
                "floor_share": round(floor / median, 3),
                "gemm_gflops": round(max(rates) / 1e9, 1),
            }
    for worker in workers.values():
        worker.stop()
    return figures


def first_steps(size: str, which: str) -> dict[str, float]:
    """Time of the first step and memory in fresh processes; of compiled passes, with PyTorch's cache empty and full."""
    command = [sys.executable, "-m", "benchmarks.step", "--peak", size, which]
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as cache:
        for kind in ("", "cached_") if "compiled" in which else ("",):
            environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
            output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
            figures |= {kind + name: round(value, 1) for name, value in json.loads(output.splitlines()[-1]).items()}
    return figures


def print_first_steps(size: str, which: str) -> None:
    """The measurement of ``first_steps``, in that process: peaks of three steps and all before them, and of a fourth."""
    from tl_vpd.training import Trainer  # noqa: F401 (imports are not part of it)

    before, processors = harness.peak_mb(), processor_seconds()
    step = reference_step(SIZES[size]) if which == REFERENCE else trainer_step(SIZES[size], which)
    figures = {"first_step_s": harness.seconds_of(step), "first_step_cpu_s": processor_seconds() - processors}
    for _ in range(2):
        step()
    figures["peak_mb"] = harness.peak_mb() - before
    harness.restart_peak()
    step()
    print(json.dumps(figures | {"settled_mb": harness.peak_mb() - before}))


def processor_seconds() -> float:
    """Of this process and of those it has waited for, such as compilers."""
    uses = [resource.getrusage(of) for of in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in uses)


def chosen_variants(size: str, only: str | None) -> list[str]:
    """The variants measured at a size: those asked for and the paper's, or all that belong there.

    Raises:
        ValueError: one does not belong there.
    """
    # V is for what a large vocabulary changes; elsewhere logits are few.
    variants = ["paper", "whole_logits"] if size == "V" else [which for which in VARIANTS if which != "whole_logits"]
    if only is None:
        return variants
    asked = {"paper", *only.split(",")}
    if unknown := asked - set(variants):
        raise ValueError(f"Size {size} has no {', '.join(sorted(unknown))}: choose from {', '.join(variants)}.")
    return [which for which in variants if which in asked]


def size_record(size: str, rounds: int, variants: Sequence[str]) -> dict[str, dict[str, float]]:
    """All figures of a size, by variant."""
    figures = measure(size, rounds, [which for which in variants if which != "checkpoint"]) if rounds else {}
    for which in variants if size != "L" else ():
        figures.setdefault(which, {}).update(first_steps(size, which))
    if SIZES[size].has_reference:
        figures["paper"]["reference_peak_mb"] = first_steps(size, REFERENCE)["peak_mb"]
    return figures


def options() -> argparse.ArgumentParser:
    """The command line."""
    parser = harness.parser("step", __doc__)
    parser.add_argument("--sizes", default="S,M")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--variants", help="only these, as paper,compiled; paper is among them (default: all)")
    parser.add_argument(
        "--peak",
        nargs=2,
        metavar=("SIZE", "WHICH"),
        help="print the first step's seconds and the peaks of memory of one",
    )
    return parser


def main() -> None:
    """Measures and writes the record."""
    arguments = options().parse_args()
    warnings.simplefilter("ignore")
    if arguments.peak:
        print_first_steps(*arguments.peak)
        return
    record: dict[str, Any] = {}
    for size in arguments.sizes.split(","):
        rounds = arguments.rounds * (3 if size == "S" else 1)
        figures = size_record(size, rounds, chosen_variants(size, arguments.variants))
        record[size] = figures.pop("paper")
        for which, values in figures.items():
            record.setdefault(which, {})[size] = values
        print(json.dumps(record, indent=2))
        harness.write(arguments.out, record, " ".join(["step", *sys.argv[1:]]), rounds=arguments.rounds)


if __name__ == "__main__":
    main()
