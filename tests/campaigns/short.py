"""Runs one campaign in a process of its own."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.campaigns.counts import Budget, Counts

SLACK = 600.0
"""Seconds that a campaign may go on after its budget (its start, its last try) before it counts as hung."""


def campaign_names() -> list[str]:
    """Every campaign of this folder, in alphabetical order: the modules that have ``TRIED``."""
    files = sorted(Path(__file__).parent.glob("[a-z]*.py"))
    return [f.stem for f in files if not f.stem.startswith("test_") and "\nTRIED" in f.read_text(encoding="utf-8")]


def budget_of(name: str, short: bool) -> Budget:
    """A campaign's short or long budget."""
    module = importlib.import_module(f"tests.campaigns.{name}")
    return module.SHORT if short else module.LONG


def run_apart(name: str, *, short: bool, seed: int) -> Counts:
    """A campaign's counts, from a process of its own; a crash or a hang of the process is an outcome too.

    Args:
        name: of the campaign's module.
        short: its short form.
        seed: of what is tried.
    """
    code = "import sys; from tests.campaigns import short; short.write(*sys.argv[1:])"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "counts.json"
        command = [sys.executable, "-c", code, name, str(int(short)), str(seed), str(out)]
        return counts_of(command, out, budget_of(name, short).seconds + SLACK)


def counts_of(command: list[str], out: Path, seconds: float) -> Counts:
    """Runs a command that writes counts; a crash or a hang is an outcome too.

    Args:
        command: and its arguments.
        out: the JSON file that it writes.
        seconds: after which it counts as hung and is ended, with the processes that it started.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        return _failed("hung", said[-3000:])
    if process.returncode != 0 or not out.exists():
        return _failed("crashed", f"exit code {process.returncode}: {said[-3000:]}")
    return Counts.from_dict(json.loads(out.read_text(encoding="utf-8")))


def write(name: str, short: str, seed: str, out: str) -> None:
    """Runs a campaign in this process and writes its counts.

    Args:
        name: of the campaign's module.
        short: ``"1"`` for its short form.
        seed: of what is tried.
        out: the JSON file.
    """
    module = importlib.import_module(f"tests.campaigns.{name}")
    counts = module.run(budget_of(name, short == "1"), int(seed))
    Path(out).write_text(json.dumps(counts.as_dict()), encoding="utf-8")


def check_short(name: str, seed: int = 0) -> None:
    """The test of a campaign: its short form.

    Args:
        name: of the campaign's module.
        seed: of what is tried.

    Raises:
        AssertionError: a try failed, or nothing was tried.
    """
    counts = run_apart(name, short=True, seed=seed)
    assert counts.tries, f"{name} tried nothing"
    assert not counts.failures, counts.report()


def _failed(outcome: str, example: str) -> Counts:
    counts = Counts()
    counts.add(outcome, example)
    return counts
