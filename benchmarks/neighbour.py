"""Training steps beside another busy process, with threads that spin and with threads that sleep while they wait.

    python -m benchmarks.neighbour                # at most three minutes; on a machine that does nothing else
    python -m benchmarks.neighbour --rounds 1     # in short form

Two processes make steps of size S on two threads, one as OpenMP waits by default, one with ``OMP_WAIT_POLICY=PASSIVE`` as the
command line has it. Rounds alternate between them, each alone and beside a process that occupies one core. Two cores are used.
A turn ends after 5 steps, or with the first after ``LONGEST`` seconds: spinning threads can make one take thirty times as long.
``ratio`` is the median of a step beside the busy process over the median alone.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time

from benchmarks import harness
from tl_vpd.openmp import SETTINGS

STEPS, LONGEST = 5, 5.0
POLICIES = {"default": {}, "passive": {"OMP_WAIT_POLICY": "PASSIVE"}}
BUSY = "while True: pass"


def main() -> None:
    """Runs the benchmark, or, with ``--steps``, one of its processes."""
    parser = harness.parser("neighbour", __doc__)
    parser.add_argument(
        "--steps", action="store_true", help="make steps for the benchmark, which starts such processes"
    )
    parser.add_argument("--rounds", type=int, default=6)
    arguments = parser.parse_args()
    if arguments.steps:
        make_steps()
        return
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        sys.exit("The benchmark needs two cores.")
    os.sched_setaffinity(0, cores)
    seconds = measure(cores, arguments.rounds)
    record = {
        name: {
            **{f"{how}_s": statistics.median(values) for how, values in times.items()},
            "ratio": statistics.median(times["beside"]) / statistics.median(times["alone"]),
        }
        for name, times in seconds.items()
    }
    harness.write(arguments.out, record, "neighbour", size="S", steps=STEPS, rounds=arguments.rounds)
    print({name: round(values["ratio"], 2) for name, values in record.items()})


def measure(cores: list[int], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds per step of each policy, alone and beside a busy process, in rounds that alternate."""
    clean = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    command = [sys.executable, "-m", "benchmarks.neighbour", "--steps"]
    workers = {
        name: subprocess.Popen(
            command,
            env=clean | {"OMP_NUM_THREADS": "2"} | policy,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name, policy in POLICIES.items()
    }
    seconds: dict[str, dict[str, list[float]]] = {name: {"alone": [], "beside": []} for name in workers}
    try:
        for worker in workers.values():
            answer(worker)  # has warmed up
        for _ in range(rounds):
            for how in ("alone", "beside"):
                busy = subprocess.Popen([sys.executable, "-c", BUSY]) if how == "beside" else None
                if busy is not None:
                    os.sched_setaffinity(busy.pid, cores[1:])
                    time.sleep(0.2)
                try:
                    for name, worker in workers.items():
                        seconds[name][how].append(answer(worker))
                finally:
                    if busy is not None:
                        busy.kill()
                        busy.wait()
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    return seconds


def answer(worker: subprocess.Popen[str]) -> float:
    """Asks a process for steps; seconds of one."""
    questions, answers = worker.stdin, worker.stdout
    assert questions is not None
    assert answers is not None
    questions.write("\n")
    questions.flush()
    return float(answers.readline())


def make_steps() -> None:
    """Makes steps for each line that comes in, and answers with the seconds of one."""
    from benchmarks.models import SIZES, trainer_step

    step = trainer_step(SIZES["S"])
    for _ in sys.stdin:
        start, done = time.perf_counter(), 0
        while done < STEPS and time.perf_counter() - start < LONGEST:
            step()
            done += 1
        sys.stdout.write(f"{(time.perf_counter() - start) / done}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
