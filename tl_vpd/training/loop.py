"""The steps of a run, with metrics, states and interrupts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tl_vpd.training.metrics import StepMetrics
from tl_vpd.training.run_files import RunFiles
from tl_vpd.training.run_report import RunReport
from tl_vpd.training.state import StoredRun, load_state
from tl_vpd.training.trainer import Trainer


@dataclass(frozen=True)
class Loop:
    """A run's steps.

    Attributes:
        trainer: makes them.
        batch: what each is made on, by its number: the arguments of ``trainer.step``.
        files: of the run (None: nothing is written).
        report: what the run says.
        log_every: steps between rows of metrics.
        interrupted: set when the run is to stop after a step.
        data: the description of what it is trained on, for states.
        history: rows of metrics.
    """

    trainer: Trainer
    batch: Callable[[int], tuple[Any, ...]]
    files: RunFiles | None
    report: RunReport
    log_every: int
    interrupted: threading.Event
    data: Mapping[str, Any]
    history: list[StepMetrics] = field(default_factory=list)

    def start(self, state: Path | None, history: Sequence[StepMetrics], *, warm_up: bool) -> None:
        """Restores a state, or warms up where V and U are new; then writes the first files."""
        if state is not None:
            load_state(self.trainer, state)
            # Of an older version, the history is what was logged, and may be ahead of the state.
            self.history.extend(metrics for metrics in history if metrics.step < self.trainer.done)
        elif warm_up:
            self.trainer.warm_up(progress=self.report.show)
        if self.files is not None:
            self.files.start(self.trainer, self._run())

    def train(self) -> None:
        """Goes on to the last step, or until an interrupt."""
        trainer = self.trainer
        with self.report:
            while trainer.done < trainer.config.steps and not self._stopped():
                batch, start = self.batch(trainer.done), time.perf_counter()
                metrics = trainer.step(*batch)
                seconds = time.perf_counter() - start
                logged = metrics.step % self.log_every == 0 or trainer.done == trainer.config.steps
                self.report.step(metrics, seconds, logged=logged)
                if logged:
                    self.history.append(metrics)
                    if self.files is not None:
                        self.files.log(trainer, metrics)
                if self._due():
                    self._save()
            if not self._due():
                self._save()
        folder = None if self.files is None else self.files.folder
        self.report.end(interrupted=self.interrupted.is_set(), folder=folder)

    def _due(self) -> bool:
        return self.files is not None and self.trainer.done % self.files.saving.save_every == 0

    def _save(self) -> None:
        if self.files is not None:
            self.files.save(self.trainer, self._run())

    def _run(self) -> StoredRun:
        return StoredRun(self.data, self.history)

    def _stopped(self) -> bool:
        """Whether any process was interrupted: all of them stop after the same step."""
        if self.trainer.world.size == 1:
            return self.interrupted.is_set()
        count = torch.tensor(float(self.interrupted.is_set()), device=self.trainer.decomposition.device)
        stop = bool(self.trainer.world.add(count) > 0)
        if stop:
            self.interrupted.set()
        return stop
