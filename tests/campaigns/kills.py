"""Trainings that are killed or interrupted at any line of what reads and writes their files, and resumed."""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import tl_vpd
from tests.campaigns.counts import Budget, Counts
from tests.campaigns.tiny_runs import go_on, in_child, leftovers, result_of, train

TRIED = """A short training, saved after every step, gets SIGKILL before any line of the code that runs it and writes its files,
or in the middle of a write, or SIGTERM, or one or two Ctrl-C. Resumed, it must give the result, the state and the metrics of an
undisturbed run bit for bit; interrupts must leave signal handlers as they were, and no temporary file may remain."""
SHORT, LONG = Budget(60, 45), Budget(3_000, 540)

ROOT = Path(tl_vpd.__file__).parent
TRACED = tuple(
    str(ROOT / name)
    for name in (
        "files",
        "components/storage.py",
        "training/session.py",
        "training/run_files.py",
        "training/state.py",
        "training/interrupts.py",
    )
)
KINDS = ("SIGKILL", "SIGKILL", "SIGKILL in a write", "SIGTERM", "Ctrl-C", "Ctrl-C twice")


def run(budget: Budget, seed: int) -> Counts:
    """Disturbs trainings.

    Args:
        budget: of trainings.
        seed: of where they are disturbed.
    """
    counts = Counts()
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a process in the background may have been told to ignore it
    with tempfile.TemporaryDirectory() as place:
        undisturbed = Path(place) / "undisturbed"
        _, said = in_child(lambda: json.dumps(traced_training(undisturbed, {})))
        lines, largest = json.loads(said), max(f.stat().st_size for f in undisturbed.rglob("*") if f.is_file())
        assert isinstance(lines, int), f"the undisturbed training failed: {lines}"
        expected = result_of(undisturbed)
        for i in budget.tries_left():
            chooses, folder = random.Random(f"{seed}:{i}"), Path(place) / "run"
            kind, at = chooses.choice(KINDS), chooses.randint(1, lines)
            act: Callable[[], Any]
            if kind == "SIGKILL in a write":
                at = chooses.randint(0, largest)

                def act(folder: Path = folder, limit: int = at) -> object:
                    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # ends the process in the write that goes beyond
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
                    return traced_training(folder, {})
            else:
                number = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM}.get(kind, signal.SIGINT)
                again = at + chooses.randint(1, 60) if kind == "Ctrl-C twice" else at

                def act(folder: Path = folder, at: int = at, again: int = again, number: int = number) -> object:
                    return traced_training(folder, {at: number, again: number})

            ended, said = in_child(lambda act=act: str(act()))  # type: ignore[misc]
            counts.add(*judged(folder, kind, ended, said, expected, f"seed {seed}, try {i}: {kind} at {at}"))
            shutil.rmtree(folder, ignore_errors=True)
    return counts


def traced_training(folder: Path, signals: dict[int, int]) -> Any:
    """Trains; returns how many lines of the traced files ran, or what went wrong.

    Args:
        folder: of the run.
        signals: which are raised before which of the lines.
    """
    count = 0

    def line(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        if event == "line":
            count += 1
            if count in signals:
                signal.raise_signal(signals[count])
        return line

    def call(frame: FrameType, event: str, argument: Any) -> Any:
        return line if frame.f_code.co_filename.startswith(TRACED) else None

    sys.settrace(call)
    try:
        train(folder)
    except KeyboardInterrupt:
        pass
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        sys.settrace(None)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    return count if handlers == (signal.default_int_handler, signal.SIG_DFL) else f"handlers {handlers}"


def judged(folder: Path, kind: str, ended: int, said: str, expected: str, example: str) -> tuple[str, str]:
    """Resumes a disturbed training in another process; the outcome, and how to do it again.

    Args:
        folder: of the run.
        kind: of disturbance.
        ended: the number of the signal that ended the training.
        said: what the training returned.
        expected: the checksum of the undisturbed run.
        example: how to do it again.
    """
    if ended == -1:
        return "hung", example
    if not ended and not said.isdigit():
        return ("left behind" if said.startswith("handlers") else "wrong exception"), f"{example}: {said}"
    code, result = in_child(lambda: _resumed(folder))
    if code == -1:
        return "hung", f"{example}, when it was resumed"
    if result == expected:
        left = leftovers(folder)
        return ("left behind", f"{example}: {left}") if left else (f"resumed bit for bit after {kind}", "")
    return ("silent" if len(result) == len(expected) else "wrong exception"), f"{example}, resumed: {result}"


def _resumed(folder: Path) -> str:
    try:
        go_on(folder)
        return result_of(folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
