"""Steps of several versions of this repository in turn: what a change brought, on a machine whose speed wanders.

    python -m benchmarks.versions HEAD~3:compiled HEAD:compiled .:reference --size S --rounds 50

A version is a commit, or ``.`` for the files in the working tree, and behind a colon one of that version's variants
(``benchmarks.models``) or ``reference``. Each runs in a separate process; a round is one step of each, in random order.
Printed: median seconds, and the median over rounds of the ratio to the first one.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 6
"""Steps before any is timed: graphs are made, memory is allocated."""


class Version:
    """A process that carries out steps of a version when told to."""

    def __init__(self, name: str, size: str, trees: Path) -> None:
        commit, _, variant = name.partition(":")
        self.name, tree = name, ROOT if commit == "." else trees / commit.replace("/", "_")
        if not tree.exists():
            tree.mkdir()
            files = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
            subprocess.run(["tar", "x"], cwd=tree, input=files, check=True)
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", size, variant or "paper"],
            env={**os.environ, "PYTHONPATH": str(tree)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def step(self) -> float:
        """Seconds of one step.

        Raises:
            RuntimeError: the process has ended.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"The process of {self.name} has ended: its message is above.")
        return float(answer)


def work(size: str, variant: str) -> None:
    """What a version's process runs: a step for every line it reads."""
    from benchmarks.step import step_of

    warnings.simplefilter("ignore")
    step = step_of(size, variant)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print(time.perf_counter() - start, flush=True)


def measure(names: list[str], size: str, rounds: int) -> dict[str, tuple[float, float]]:
    """By version: median seconds, median ratio to the first."""
    with tempfile.TemporaryDirectory() as trees:
        versions = [Version(name, size, Path(trees)) for name in names]
        try:
            for version in versions:
                for _ in range(WARM_UP):
                    version.step()
            seconds: list[dict[str, float]] = []
            for _ in range(rounds):
                order = random.sample(versions, len(versions))
                seconds.append({version.name: version.step() for version in order})
        finally:
            for version in versions:
                version.process.kill()
                version.process.wait()
    return {
        name: (statistics.median(r[name] for r in seconds), statistics.median(r[name] / r[names[0]] for r in seconds))
        for name in names
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", help="COMMIT:VARIANT, of which the first is compared with")
    parser.add_argument("--size", default="S")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--worker", nargs=2, metavar=("SIZE", "VARIANT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(*arguments.worker)
        return
    if len(set(arguments.versions)) != len(arguments.versions) or len(arguments.versions) < 2:
        parser.error("give two or more versions, each once")
    for name, (seconds, ratio) in measure(arguments.versions, arguments.size, arguments.rounds).items():
        print(f"{name:30} {seconds:.4f} s   {ratio:.3f}")


if __name__ == "__main__":
    main()
