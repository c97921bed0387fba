"""Damaged files of a training: states, metrics.jsonl, tokens.json."""

from __future__ import annotations

import json
import logging
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.campaigns.counts import Budget, Counts
from tests.campaigns.tiny_runs import CONFIG, interrupted_before, is_sentence, result_of, train
from tl_vpd.training.state import latest_state

TRIED = """A training is stopped after three of five steps and one of its files is damaged: bytes of every region of the newest
state flipped, zeroed, cut, doubled, or exchanged with another state's; lines and fields of metrics.jsonl and tokens.json changed,
and either removed. Resumed, it must give the undisturbed result bit for bit, or refuse in one sentence; where a state is damaged,
the one before must then resume to that result."""
SHORT, LONG = Budget(120, 50), Budget(6_000, 540)

SLOW = 60.0
"""Seconds of one try that count as hanging."""
VALUES = ("null", "true", "-1", "0", "3.5", '"x"', "[]", "{}", "NaN", "1e999", "9" * 5_000, "[" * 5_000)


class Said(logging.Handler):
    """Whether the package has logged a warning."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Stores a warning."""
        self.lines.append(record.getMessage())


def run(budget: Budget, seed: int) -> Counts:
    """Damages runs and resumes them.

    Args:
        budget: of damages.
        seed: of the damages.
    """
    counts, log, said = Counts(), logging.getLogger("tl_vpd"), Said()
    log.addHandler(said)
    try:
        with tempfile.TemporaryDirectory() as place:
            whole, stopped, other = (Path(place) / name for name in ("whole", "stopped", "other"))
            train(whole)
            for folder, config in ((stopped, CONFIG), (other, CONFIG.model_copy(update={"seed": 1}))):
                with interrupted_before(2):
                    train(folder, config=config)
            expected = result_of(whole)
            for i in budget.tries_left():
                chooses, folder = random.Random(f"{seed}:{i}"), Path(place) / "run"
                shutil.copytree(stopped, folder)
                what = damaged(folder, other, chooses)
                said.lines.clear()
                outcome, detail = judged(folder, expected, said, of_state=what.startswith("step-"))
                counts.add(outcome, f"seed {seed}, try {i}: {what}: {detail}")
                shutil.rmtree(folder)
    finally:
        log.removeHandler(said)
    return counts


def judged(folder: Path, expected: str, said: Said, *, of_state: bool) -> tuple[str, str]:
    """Resumes a damaged run; the outcome, and what was said.

    Args:
        folder: of the run.
        expected: the checksum of the undisturbed run.
        said: collects warnings.
        of_state: whether a state is damaged, and the one before must do.
    """
    state, start = latest_state(folder / "state"), time.monotonic()
    assert state is not None
    try:
        train(folder, resume=True)
    except Exception as error:
        if not isinstance(error, ValueError | OSError) or not is_sentence(error, str(folder)):
            return "wrong exception", repr(error)
        if time.monotonic() - start > SLOW:
            return "hung", repr(error)
        if not of_state:
            return "refused", ""
        before = sorted(state.parent.glob("step-*.safetensors"))[0]
        try:
            train(folder, resume=before)
        except Exception as second:
            return "wrong exception", f"{error!r}, then from {before.name}: {second!r}"
        return ("refused, the state before resumed", "") if result_of(folder) == expected else ("silent", repr(error))
    if result_of(folder) != expected:
        return "silent", "; ".join(said.lines)
    return ("said and right" if said.lines else "right"), ""


def damaged(folder: Path, other: Path, chooses: random.Random) -> str:
    """Damages one file of a run; what was done.

    Args:
        folder: of the run.
        other: of a run with another seed.
        chooses: at random.
    """
    state = latest_state(folder / "state")
    assert state is not None
    kind = chooses.choice(("state", "state", "state", "other state", "metrics.jsonl", "tokens.json", "bytes"))
    if kind == "state":
        return f"{state.name} {changed_bytes(state, chooses, header=True)}"
    if kind == "other state":
        source = chooses.choice([latest_state(other / "state"), *folder.glob("state/*2.safetensors")])
        assert source is not None
        shutil.copy(source, state)
        return f"{state.name} is {source}"
    path = folder / (chooses.choice(("metrics.jsonl", "tokens.json")) if kind == "bytes" else kind)
    if kind == "bytes":
        return f"{path.name} {changed_bytes(path, chooses, header=False)}"
    return f"{path.name} {chooses.choice((_removed, _field, _line))(path, chooses)}"


def changed_bytes(path: Path, chooses: random.Random, *, header: bool) -> str:
    """Changes bytes of a file; what was done.

    Args:
        path: of the file.
        chooses: at random.
        header: whether it begins with a safetensors header, whose bytes are then hit as often as all others.
    """
    data = bytearray(path.read_bytes())
    end = 8 + int.from_bytes(data[:8], "little") if header else len(data)
    start = chooses.choice((chooses.randrange(8), chooses.randrange(end), chooses.randrange(len(data))))
    start = min(start, len(data) - 1)
    n = min(chooses.choice((1, 4, 64, 1024)), len(data) - start)
    kind = chooses.choice(("flip", "zero", "random", "cut out", "cut off", "double", "append"))
    if kind == "flip":
        data[start] ^= 1 << chooses.randrange(8)
    elif kind == "zero":
        data[start : start + n] = bytes(n)
    elif kind == "random":
        data[start : start + n] = chooses.randbytes(n)
    elif kind == "cut out":
        del data[start : start + n]
    elif kind == "cut off":
        del data[start:]
    elif kind == "double":
        data[start:start] = data[start : start + n]
    else:
        data += chooses.randbytes(n)
    path.write_bytes(data)
    return f"{kind} {n} bytes at {start}"


def _removed(path: Path, chooses: random.Random) -> str:
    path.unlink()
    if chooses.random() < 0.3:
        path.mkdir()
        return "replaced by a folder"
    return "removed"


def _field(path: Path, chooses: random.Random) -> str:
    """One value of one line becomes another, or its key another or double."""
    lines = path.read_text(encoding="utf-8").splitlines()
    at = chooses.randrange(len(lines))
    lines = [json.dumps(json.loads("".join(lines)))] if path.suffix == ".json" else lines
    at = min(at, len(lines) - 1)
    row = json.loads(lines[at])
    key, value = chooses.choice(list(row)), chooses.choice(VALUES)
    change: Callable[[], str] = chooses.choice(
        (
            lambda: lines[at].replace(f'"{key}": {json.dumps(row[key])}', f'"{key}": {value}'),
            lambda: lines[at].replace(f'"{key}"', '"another"'),
            lambda: lines[at].replace("{", f'{{"{key}": {json.dumps(row[key])}, ', 1),
        )
    )
    lines[at] = change()
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"{key} of line {at}: {lines[at][:200]}"


def _line(path: Path, chooses: random.Random) -> str:
    """Lines removed, doubled, exchanged, or another text in their place."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    at, kind = chooses.randrange(len(lines)), chooses.choice(("remove", "double", "shuffle", "text", "cut"))
    if kind == "remove":
        del lines[at]
    elif kind == "double":
        lines.insert(at, lines[at])
    elif kind == "shuffle":
        chooses.shuffle(lines)
    elif kind == "text":
        lines[at] = chooses.choice(VALUES) + "\n"
    else:
        lines = [*lines[:at], lines[at][: chooses.randrange(len(lines[at]))]]
    path.write_text("".join(lines), encoding="utf-8")
    return f"{kind} line {at}"
