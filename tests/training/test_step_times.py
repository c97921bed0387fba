"""What is said of the time of steps: a median, and one hint where other processes disturb them."""

from __future__ import annotations

import io
import logging

import pytest
import torch

from tl_vpd import openmp
from tl_vpd.training import decompose, run_report
from tl_vpd.training.step_times import RECENT, StepTimes


def times(*seconds):
    result = StepTimes()
    for value in seconds:
        result.add(value)
    return result


def test_the_median_is_of_recent_steps_and_one_long_step_does_not_count():
    assert times(1.0, 1.0, 60.0).median == 1.0
    assert times(*[9.0] * RECENT, *[2.0] * RECENT).median == 2.0


@pytest.mark.parametrize(
    ("seconds", "disturbed"),
    [
        ([1.0, 1.5, 2.0] * 20, False),  # a quiet machine
        ([1.0] * 25 + [30.0] * 5, False),  # a few long ones: states, a compiler
        ([1.0, 4.0] * 20, True),
        ([1.0] * 5 + [4.1] * 30, True),  # from one moment on
        ([1.0, 9.0] * 14, False),  # too few to tell
    ],
)
def test_steps_are_disturbed_where_a_third_takes_four_times_as_long(seconds, disturbed):
    assert times(*seconds).disturbed is disturbed


class Clock:
    """A clock that steps move on."""

    def __init__(self, durations):
        self.now, self.durations = 0.0, iter(durations)

    def perf_counter(self):
        return self.now


def run(monkeypatch, target, rows, config, durations):
    """A run whose steps take these times."""
    from tl_vpd.training import Trainer, loop

    clock, step = Clock(durations), Trainer.step
    for module in (loop, run_report):
        monkeypatch.setattr(module, "time", clock)

    def timed(trainer, *batch):
        clock.now += next(clock.durations)
        return metrics[0] if metrics else step(trainer, *batch)

    metrics = []

    def once(trainer, *batch):
        result = timed(trainer, *batch)
        if not metrics:
            metrics.append(result)
        else:
            trainer.done += 1
        return result

    monkeypatch.setattr(Trainer, "step", once)
    decompose(target, rows, config.model_copy(update={"steps": len(durations)}), progress=False)


@pytest.mark.parametrize(
    ("threads", "told", "durations", "hints"),
    [
        (2, False, [1.0, 5.0] * 30, 1),
        (2, False, [1.0, 1.6] * 30, 0),
        (2, True, [1.0, 5.0] * 30, 0),  # threads sleep while they wait
        (1, False, [1.0, 5.0] * 30, 0),  # one thread waits for nobody
    ],
)
def test_a_hint_comes_once_where_threads_spin(
    target, rows, config, monkeypatch, caplog, threads, told, durations, hints
):
    for name in openmp.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    if told:
        monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    with caplog.at_level(logging.WARNING):
        run(monkeypatch, target, rows, config, durations)
    said = [r.getMessage() for r in caplog.records if "OMP_WAIT_POLICY=PASSIVE" in r.getMessage()]
    assert len(said) == hints
    if hints:
        assert said[0].startswith("Steps now take up to 5 s, and the fastest took 1 s: ") and "\n" not in said[0]


def test_the_bars_estimate_is_the_median():
    shown = io.StringIO()
    with run_report.Bar(total=10, file=shown, ascii=True, mininterval=0) as bar:
        assert bar.format_dict["rate"] is None
        bar.seconds = 20.0
        bar.update()
    assert "<03:00, 20.00s/it]" in shown.getvalue()  # nine steps to go
