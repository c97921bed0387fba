"""The files of a run in its folder.

==================  ===================================================================================================
``state/``          all that is needed to resume, with checksums (``tl_vpd.training.state``)
``decomposition/``  the result
``metrics.jsonl``   one line per logged step, to read while the run goes on; resuming writes it again from the state
``tokens.json``     what it is trained on: rows, their length, a checksum; the same
``.lock``           locked while a process trains
==================  ===================================================================================================
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from tl_vpd.decomposition import Decomposition
from tl_vpd.files.atomic import named_errors, write_text
from tl_vpd.files.json_files import json_text, parse_json, read_json, write_json
from tl_vpd.files.lock import locked
from tl_vpd.training.config import SavingConfig
from tl_vpd.training.distributed.processes import World
from tl_vpd.training.metrics import StepMetrics, metrics_of
from tl_vpd.training.state import StoredRun, latest_state, read_run, save_state
from tl_vpd.training.trainer import Trainer

log = logging.getLogger(__name__)


class RunFiles:
    """What a run reads and writes in its folder; only the first process writes."""

    def __init__(self, folder: Path, saving: SavingConfig) -> None:
        self.folder, self.saving = folder, saving
        self._metrics, self._tokens = folder / "metrics.jsonl", folder / "tokens.json"

    @contextmanager
    def locked(self, world: World, device: torch.device) -> Iterator[None]:
        """One run a folder: the first process locks it, and all raise if another run has.

        Raises:
            OSError: the folder is in use, or cannot be written.
        """
        lock, failure = locked(self.folder), None
        if world.first:
            try:
                lock.__enter__()
            except OSError as error:
                failure = error
        world.raise_together(failure, device, f"The first process could not lock {self.folder}.")
        try:
            yield
        finally:
            if world.first:
                lock.__exit__(None, None, None)

    def state_to_resume(self, resume: bool | Path) -> Path | None:
        """The state to resume from, or None where a new run starts.

        Args:
            resume: from the newest state, or from this one.

        Raises:
            FileNotFoundError: there is none to resume from.
            FileExistsError: the folder holds a run and ``resume`` is off.
        """
        states = self.folder / "state"
        if isinstance(resume, Path):
            if not resume.is_file() or resume.resolve().parent != states.resolve():
                raise FileNotFoundError(f"{resume} is not a state of {self.folder}: give a file of {states}.")
            return resume
        state = latest_state(states)
        if resume and state is None:
            raise FileNotFoundError(f"{self.folder} holds no training state to resume from; start without resume.")
        occupied = state is not None or (self.folder / "decomposition").exists() or self._metrics.exists()
        if occupied and not resume:
            raise FileExistsError(
                f"{self.folder} contains a run: pass resume=True to continue it, or choose another folder."
            )
        return state

    def stored_run(self, state: Path, data: Mapping[str, Any]) -> StoredRun:
        """What a state knows of its run, compared with the data and with the files beside it.

        Args:
            state: to resume from.
            data: the description of what the run would go on with.

        Raises:
            ValueError: the state is damaged, or the data is other data.
            FileNotFoundError: a state of an older version has lost the files beside it.
        """
        run = read_run(state)
        if run.data is None:  # an older version, whose files beside the state are all there is
            for path in (self._tokens, self._metrics):
                if not path.is_file():
                    raise FileNotFoundError(
                        f"{path} is missing, and {state} is of an older version that does not have its content: put it back."
                    )
            run = StoredRun(self._stored_tokens(), self._stored_history())
        else:
            self._compare_copies(run)
        # A checksum of all rows exists only where they are in memory, which may be so in one of the runs alone.
        stored = run.data or {}
        if any(stored[key] != data[key] for key in stored.keys() & data.keys()):
            raise ValueError(
                f"{self.folder} was trained on other tokens ({stored.get('rows')} rows of {stored.get('context')}): resume with "
                "the rows the run was started with, or choose another folder."
            )
        return replace(run, data=data)

    def start(self, trainer: Trainer, run: StoredRun) -> None:
        """Writes the first state, the data's description and the history, so that a folder that cannot be written fails now."""
        self.save(trainer, run)
        if trainer.world.first:
            write_json(self._tokens, run.data)
            write_text(self._metrics, "".join(_line(m) for m in run.history))

    def save(self, trainer: Trainer, run: StoredRun) -> None:
        """Writes a state."""
        save_state(trainer, self.folder / "state", keep=self.saving.keep_states, run=run)

    def log(self, trainer: Trainer, metrics: StepMetrics) -> None:
        """Adds a line of metrics."""
        if trainer.world.first:
            state = latest_state(self.folder / "state")
            with (
                named_errors(self._metrics, None if state is None else f"{state.name} is intact"),
                self._metrics.open("a", encoding="utf-8") as file,
            ):
                file.write(_line(metrics))

    def finish(self, decomposition: Decomposition) -> None:
        """Writes the result."""
        decomposition.save(self.folder / "decomposition")

    def _compare_copies(self, run: StoredRun) -> None:
        """Says where a file beside the state is not what the state has; it is written again from the state."""
        self._compare(self._tokens, self._stored_tokens, run.data)
        self._compare(self._metrics, lambda: self._stored_history()[: len(run.history)], list(run.history))

    def _compare(self, path: Path, read: Callable[[], Any], expected: Any) -> None:
        try:
            problem = "" if read() == expected else "it differs from what the state has"
        except (OSError, ValueError) as error:
            problem = str(error).rstrip(".")
        if problem:
            log.warning("%s is written again from the state: %s.", path, problem)

    def _stored_tokens(self) -> dict[str, Any]:
        """The description in ``tokens.json``; raises ValueError or FileNotFoundError if there is none."""
        stored = read_json(self._tokens)
        if not isinstance(stored, dict) or not {"rows", "context"} <= set(stored):
            raise ValueError(f"{self._tokens} is damaged: it has no 'rows' and 'context'.")
        return stored

    def _stored_history(self) -> list[StepMetrics]:
        """The rows of ``metrics.jsonl``; of a killed run, the last line may be incomplete.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged.
        """
        if not self._metrics.is_file():
            raise FileNotFoundError(f"{self._metrics} does not exist.")
        *lines, _incomplete = self._metrics.read_bytes().split(b"\n")
        history: list[StepMetrics] = []
        for number, line in enumerate(lines, start=1):
            row = parse_json(line, f"Line {number} of {self._metrics}")
            try:
                metrics = metrics_of(row if isinstance(row, dict) else {})
            except ValueError as error:
                raise ValueError(f"Line {number} of {self._metrics} is not a row of metrics: {error}") from error
            if history and metrics.step <= history[-1].step:
                raise ValueError(f"Line {number} of {self._metrics} is of a step that is there before.")
            history.append(metrics)
        return history


def plain_data(description: Mapping[str, Any]) -> dict[str, Any]:
    """A description of data as it comes back from JSON.

    Raises:
        TypeError: it is not data.
        ValueError: the same.
    """
    return json.loads(json_text(dict(description)))


def _line(metrics: StepMetrics) -> str:
    return json_text(asdict(metrics)) + "\n"
