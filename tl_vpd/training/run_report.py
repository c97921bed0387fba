"""What a run says: what to expect before it, a bar while it goes on, whether it is working, and how it ended.

Reconstruction losses are shown as a share of the yardstick, what ablating the chosen sites costs (``tl_vpd.training.outlook``).
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, fields
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor
from tqdm.auto import tqdm

from tl_vpd.openmp import threads_sleep
from tl_vpd.training.memory import peak_memory
from tl_vpd.training.metrics import StepMetrics
from tl_vpd.training.outlook import Check, Outlook, due, duration
from tl_vpd.training.schedules import Schedule
from tl_vpd.training.step_times import StepTimes
from tl_vpd.training.trainer import Trainer

log = logging.getLogger(__name__)
TIMED = 6
"""Steps after which the time of a step is told: compilation and caches have been filled."""
FIRST = 2
"""Steps whose time does not count."""


class Bar(tqdm):  # type: ignore[type-arg]
    """A bar whose estimate follows the median of recent steps."""

    seconds: float | None = None
    """Of a step (None: not known)."""

    @property
    def format_dict(self) -> dict[str, Any]:
        """What the line is made from."""
        values: Any = super().format_dict
        if self.seconds is not None:
            values["rate"] = 1 / self.seconds
        return values


class RunReport:
    """What a run says. A context manager: the bar is there while it is entered.

    Args:
        trainer: of the run, before its first step.
        tokens: rows that yardstick and checks are measured on.
        token_mask: False at padding (None: no padding).
        show: whether lines and bar are shown (otherwise lines are logged).
    """

    def __init__(
        self, trainer: Trainer, tokens: Tensor, token_mask: Bool[Tensor, "batch pos"] | None, *, show: bool
    ) -> None:
        self.trainer, self.show = trainer, show
        self.outlook = Outlook(trainer.masked_model, trainer.config, tokens, token_mask)
        self._bar: Any = None
        self._steps, self._last_time = 0, 0.0
        self._intervals, self._times = StepTimes(), StepTimes()
        """From the end of a step to that of the next, and of steps alone, without data and files."""
        self.checks: list[Check] = []
        self._last: StepMetrics | None = None
        self._warned: set[str] = set()

    def __enter__(self) -> RunReport:
        self._say(*self.first_lines())
        config, done = self.trainer.config, self.trainer.done
        self._bar = Bar(
            total=config.steps, initial=done, disable=not self.show, desc="decomposing", unit="step", dynamic_ncols=True
        )
        self._last_time = time.perf_counter()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._bar.close()

    def first_lines(self) -> list[str]:
        """What will be done, and what to expect of it."""
        trainer, outlook = self.trainer, self.outlook
        config, axis = trainer.config, trainer.decomposition.site_axis
        tokens = config.batch_size * trainer.stream.pos
        lines = [
            f"{'Resuming after step' if trainer.done else 'Decomposing'} "
            + (f"{trainer.done:,} of {config.steps:,}: " if trainer.done else "")
            + f"{len(axis.names)} sites into {axis.total:,} subcomponents, {config.steps:,} steps of {tokens:,} tokens.",
            f"Ablating these sites costs {outlook.yardstick:.3g} {outlook.unit} per token: the yardstick of all losses below.",
        ]
        affordable = outlook.affordable(tokens)
        if affordable < axis.total:
            lines.append(
                f"At these coefficients at most {affordable:,.0f} always-on subcomponents can pay for themselves."
            )
        return lines

    def step(self, metrics: StepMetrics, seconds: float, *, logged: bool) -> None:
        """Notes a step.

        Args:
            metrics: of the step.
            seconds: that it took.
            logged: whether the bar shows its numbers.
        """
        trainer, steps = self.trainer, self.trainer.config.steps
        self._last = metrics
        if due(trainer.done, steps):
            self._check()
        self._time(seconds)
        self._bar.update()
        if self._steps == TIMED and trainer.done < steps:
            self._say(self.time_line())
        if logged:
            rounded = {"rounded": f"{self.checks[-1].share:.0%}"} if self.checks else {}
            self._bar.set_postfix(self.shares(metrics) | rounded | {"l0": f"{metrics.l0:.1f}"})

    def _time(self, seconds: float) -> None:
        """Notes the time of a step; says once if other processes disturb them."""
        now = time.perf_counter()
        interval, self._last_time, self._steps = now - self._last_time, now, self._steps + 1
        if self._steps <= FIRST:
            return
        self._intervals.add(interval)
        self._times.add(seconds)
        self._bar.seconds = self._intervals.median
        on_cpu = self.trainer.decomposition.device.type == "cpu" and torch.get_num_threads() > 1
        if self._times.disturbed and on_cpu and not threads_sleep() and "time" not in self._warned:
            self._warned.add("time")
            log.warning(
                "Steps now take up to %.2g s, and the fastest took %.2g s: another process seems to use the same cores, and "
                "OpenMP's threads wait for each other without sleeping. Start Python with OMP_WAIT_POLICY=PASSIVE in the "
                "environment (the command line does), or call torch.set_num_threads with fewer threads.",
                self._times.slowest,
                self._times.fastest,
            )

    def _check(self) -> None:
        """Looks at the run, and warns once of each thing that is wrong."""
        trainer = self.trainer
        self.checks.append(self.outlook.check(trainer.done))
        warning = self.checks[-1].warning(trainer.config)
        kind = " ".join((warning or "").split()[:3])  # figures come later in the sentence
        if warning is not None and trainer.world.first and kind not in self._warned:
            self._warned.add(kind)
            log.warning("Step %d of %d: %s", trainer.done, trainer.config.steps, warning)

    def table(self) -> pd.DataFrame:
        """A row per look at the run."""
        columns = [*(field.name for field in fields(Check)), "share"]
        return pd.DataFrame([asdict(check) | {"share": check.share} for check in self.checks], columns=columns)

    def shares(self, metrics: StepMetrics) -> dict[str, str]:
        """The reconstruction losses as shares of the yardstick."""
        c, yardstick = Schedule.at(metrics.step, self.trainer.config).coefficients, self.outlook.yardstick
        names = [name for name in ("stochastic", "adversarial") if getattr(c, name)]
        return {name: f"{getattr(metrics, name) / yardstick:.0%}" if yardstick else "–" for name in names}

    def time_line(self) -> str:
        """How long a step takes here, and when the run will end."""
        seconds = self._intervals.median
        left = seconds * (self.trainer.config.steps - self.trainer.done)
        end = datetime.now() + timedelta(seconds=left)
        day = (
            "" if end.date() == datetime.now().date() else f" on {end:%A}" if left < 6 * 86_400 else f" on {end:%d %B}"
        )
        memory = peak_memory(self.trainer.decomposition.device)
        return (
            f"{seconds:.2g} s per step on this machine: done at about {end:%H:%M}{day}, in {duration(left)}; "
            f"{memory / 1e9:.1f} GB of memory so far."
        )

    def end(self, *, interrupted: bool, folder: Path | None) -> None:
        """Says how the run ended.

        Args:
            interrupted: whether it was stopped.
            folder: of the run (None: nothing was written).
        """
        done, steps = self.trainer.done, self.trainer.config.steps
        where = ""
        if self._last is not None:
            shares = " and ".join(f"{name} {share}" for name, share in self.shares(self._last).items())
            total = self.trainer.decomposition.site_axis.total
            where = f": {shares} of the yardstick, L0 {self._last.l0:.1f} of {total:,}" if shares else ""
        if interrupted and done < steps:
            saved = "" if folder is None else f" Saved; resume with resume=True and folder={str(folder)!r}."
            log.warning("Interrupted: stopped after step %d of %d%s.%s", done, steps, where, saved)
        else:
            self._say(f"Finished {steps:,} steps{where}.")

    def _say(self, *lines: str) -> None:
        for line in lines:
            if self.show:
                tqdm.write(line)
            else:
                log.info(line)
