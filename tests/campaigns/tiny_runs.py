"""A training of five steps for the campaigns that disturb one, what it must give, and children to disturb it in."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.tiny import some_tokens, tiny_model
from tl_vpd import SavingConfig, VPDConfig, decompose
from tl_vpd.training import Run, Trainer
from tl_vpd.training.state import latest_state

CONFIG = VPDConfig(
    steps=5,
    batch_size=2,
    C=3,
    sites="blocks.0.*",
    gamma={"d_ci": 8, "n_blocks": 1, "n_heads": 2},
    faithfulness={"warm_up_steps": 1},
    minimality={"frequency_half_life": 3.0},
)
ROWS = some_tokens(shape=(8, 5))
SLOW = 120.0
"""Seconds of a child that count as hanging."""


def train(folder: Path, *, resume: bool | Path = False, config: VPDConfig = CONFIG) -> Run:
    """Trains, with a state and a row of metrics at every step.

    Args:
        folder: of the run.
        resume: as for ``decompose``.
        config: of the run.
    """
    saving = SavingConfig(folder=folder, save_every=1, log_every=1)
    return decompose(tiny_model(dtype=torch.float32), ROWS, config, saving=saving, resume=resume, progress=False)


def go_on(folder: Path) -> Run:
    """Resumes a run, or starts it where there is no state yet."""
    return train(folder, resume=latest_state(folder / "state") is not None)


def result_of(folder: Path) -> str:
    """A checksum of all that a finished run leaves: the result, the last state and the metrics."""
    state = latest_state(folder / "state")
    assert state is not None
    digest = hashlib.sha256((folder / "metrics.jsonl").read_bytes() + (folder / "tokens.json").read_bytes())
    for path in (folder / "decomposition" / "decomposition.safetensors", state):
        for key, tensor in sorted(load_file(path).items()):
            digest.update(key.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def leftovers(folder: Path) -> list[str]:
    """Temporary files."""
    return [str(path) for path in folder.rglob("*.tmp")]


def is_sentence(error: BaseException, *names: str) -> bool:
    """Whether an error is one sentence that has these names."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if isinstance(error, OSError) and error.errno is not None:
        text = error.strerror or ""
    return text.endswith(".") and "\n" not in text and all(name in text for name in names)


@contextmanager
def interrupted_before(step: int) -> Iterator[None]:
    """Inside, a training gets Ctrl-C during the step of this number."""
    plain = Trainer.step

    def stepped(self: Trainer, *arguments: object) -> object:
        if self.done == step:
            signal.raise_signal(signal.SIGINT)
        return plain(self, *arguments)  # type: ignore[arg-type]

    Trainer.step = stepped  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        Trainer.step = plain  # type: ignore[method-assign]


def in_child(function: Callable[[], str]) -> tuple[int, str]:
    """Runs a function in a fork of this process.

    Args:
        function: says what came out.

    Returns:
        The number of the signal that ended the child (0: none, −1: it hung), and what the function returned.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        code = 1
        try:
            said = function()
            os.write(writer, said.encode()[:4000])
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    end = time.monotonic() + SLOW
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(reader)
            return -1, ""
        time.sleep(0.002)
    with os.fdopen(reader, encoding="utf-8", errors="replace") as file:
        said = file.read()
    return (os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0), said
