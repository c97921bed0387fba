"""Tokens per second of a training step on one process and on two, of one thread each, that split its batch.

    python -m benchmarks.distributed                # at most three minutes; on a machine of two cores that does nothing else

Rounds alternate between one process and two (``torchrun``, gloo, no sharding), each in new processes and on cores of their own:
what one process does to the other's caches and memory is part of the figure. ``ratio`` is the median of tokens per second with
two over that with one; two processes make the same step of the same batch.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time

from benchmarks import harness
from benchmarks.models import SIZES, trainer_step

WARM_UP = 2


def main() -> None:
    """Runs the benchmark, or, with ``--steps``, one of its processes."""
    parser = harness.parser("distributed", __doc__)
    parser.add_argument("--steps", type=int, help="make so many steps, as a process of the benchmark")
    parser.add_argument("--size", default="M", choices=("S", "M"))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.steps:
        make_steps(arguments.size, arguments.steps)
        return
    if len(os.sched_getaffinity(0)) < 2:
        sys.exit("The benchmark needs two cores.")
    size, steps = SIZES[arguments.size], 40 if arguments.size == "S" else 5
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(arguments.rounds):
        for processes in seconds:
            seconds[processes].append(seconds_of_a_step(processes, arguments.size, steps))
    tokens = size.batch * size.context
    rates = {processes: tokens / statistics.median(times) for processes, times in seconds.items()}
    record = {
        "tokens_per_s": {str(n): round(rate) for n, rate in rates.items()},
        "ratio": round(rates[2] / rates[1], 2),
    }
    harness.write(arguments.out, record, "distributed", size=arguments.size, rounds=arguments.rounds)
    print(record)


def seconds_of_a_step(processes: int, size: str, steps: int) -> float:
    """The median over steps, of so many processes.

    Args:
        processes: how many.
        size: of the model and the batch.
        steps: that each makes.
    """
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command = [sys.executable, "-m", *launcher, "benchmarks.distributed", "--size", size, "--steps", str(steps)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return float(
        subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.split()[-1]
    )


def make_steps(size: str, steps: int) -> None:
    """Makes steps on a core of this process's, and prints the seconds of one in the first process.

    Args:
        size: of the model and the batch.
        steps: that are timed.
    """
    from tl_vpd.training.distributed.processes import world
    from tl_vpd.training.memory import keep_freed_memory

    keep_freed_memory()
    with world() as processes:
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[processes.rank]})
        step = trainer_step(SIZES[size], world=processes)
        seconds = []
        for i in range(WARM_UP + steps):
            processes.wait()
            start = time.perf_counter()
            step()
            processes.wait()
            if i >= WARM_UP:
                seconds.append(time.perf_counter() - start)
        if processes.first:
            print(statistics.median(seconds))


if __name__ == "__main__":
    main()
