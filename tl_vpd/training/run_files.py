"""The files of a run in its folder.

==================  ===================================================================================================
``metrics.jsonl``   one line per logged step
``tokens.json``     what it is trained on: rows, their length, a checksum
``state/``          for resuming (``tl_vpd.training.state``)
``decomposition/``  the result
==================  ===================================================================================================
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tl_vpd.components.storage import write_json
from tl_vpd.decomposition import Decomposition
from tl_vpd.training.config import SavingConfig
from tl_vpd.training.state import latest_state, save_state
from tl_vpd.training.trainer import StepMetrics, Trainer


class RunFiles:
    """What a run reads and writes in its folder; only the first process writes."""

    def __init__(self, folder: Path, saving: SavingConfig) -> None:
        self.folder, self.saving = folder, saving
        self._metrics, self._tokens = folder / "metrics.jsonl", folder / "tokens.json"

    def state_to_resume(self, resume: bool) -> Path | None:
        """The newest state, or None where a new run starts.

        Raises:
            FileNotFoundError: there is none to resume from.
            FileExistsError: the folder holds a run and ``resume`` is off.
        """
        state = latest_state(self.folder / "state")
        if resume and state is None:
            raise FileNotFoundError(f"{self.folder} holds no training state to resume from; start without resume.")
        occupied = state is not None or (self.folder / "decomposition").exists() or self._metrics.exists()
        if occupied and not resume:
            raise FileExistsError(
                f"{self.folder} contains a run: pass resume=True to continue it, or choose another folder."
            )
        return state

    def check_tokens(self, description: dict[str, Any]) -> None:
        """Compares the data with what the run was started with.

        Raises:
            ValueError: it is other data.
        """
        stored = json.loads(self._tokens.read_text(encoding="utf-8")) if self._tokens.is_file() else None
        # A checksum of all rows exists only where they are in memory, which may be so in one of the runs alone.
        if stored is not None and any(stored[key] != description[key] for key in stored.keys() & description.keys()):
            raise ValueError(
                f"{self.folder} was trained on other tokens ({stored['rows']} rows of {stored['context']}): resume with the "
                "rows the run was started with, or choose another folder."
            )

    def history(self, before: int) -> list[StepMetrics]:
        """The logged steps before a state's; later ones are of work that was lost and is done again."""
        if not self._metrics.is_file():
            return []
        history = []
        for line in self._metrics.read_text(encoding="utf-8").splitlines():
            try:
                row: dict[str, Any] = json.loads(line)
            except json.JSONDecodeError:
                continue  # the last line of a killed run
            if row["step"] < before:
                history.append(StepMetrics(**row))
        return history

    def start(self, trainer: Trainer, description: dict[str, Any], history: Sequence[StepMetrics]) -> None:
        """Writes the first state, the data's description and the history, so that a folder that cannot be written fails now."""
        self.save(trainer)
        if trainer.world.first:
            write_json(self._tokens, description)
            self._metrics.write_text("".join(_line(m) for m in history), encoding="utf-8")

    def save(self, trainer: Trainer) -> None:
        """Writes a state."""
        save_state(trainer, self.folder / "state", keep=self.saving.keep_states)

    def log(self, trainer: Trainer, metrics: StepMetrics) -> None:
        """Adds a line of metrics."""
        if trainer.world.first:
            with self._metrics.open("a", encoding="utf-8") as file:
                file.write(_line(metrics))

    def finish(self, decomposition: Decomposition) -> None:
        """Writes the result."""
        decomposition.save(self.folder / "decomposition")


def _line(metrics: StepMetrics) -> str:
    return json.dumps(asdict(metrics)) + "\n"
