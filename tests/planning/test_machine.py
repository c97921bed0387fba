"""The machine's numbers: what is timed and what is read."""

from __future__ import annotations

import pytest
import torch

from tl_vpd.planning.machine import ROWS, WIDTH, Machine, matrix_tflops
from tl_vpd.training import memory
from tl_vpd.training.memory import machine_memory


def a_clock(monkeypatch, step):
    """A clock that goes on by a step whenever it is read."""
    now = [0.0]

    def clock():
        now[0] += step
        return now[0]

    monkeypatch.setattr("time.perf_counter", clock)


def test_the_rate_is_that_of_matrix_products(monkeypatch):
    a_clock(monkeypatch, 1e-3)
    assert matrix_tflops() == pytest.approx(8 * 2 * ROWS * WIDTH**2 / 1e-3 / 1e12)


def test_a_slow_type_of_numbers_is_not_waited_for(monkeypatch):
    a_clock(monkeypatch, 1.0)
    assert matrix_tflops(dtype=torch.bfloat16) == pytest.approx(2 * ROWS * WIDTH**2 / 2.0 / 1e12)


def test_memory_is_that_of_the_machine_or_its_container(monkeypatch, tmp_path):
    with open("/proc/meminfo") as file:
        kilobytes = int(file.readline().split()[1])
    monkeypatch.setattr(memory, "LIMITS", (tmp_path / "max", tmp_path / "limit"))
    (tmp_path / "max").write_text("max\n")
    assert machine_memory() == pytest.approx(1024 * kilobytes, rel=0.02)
    (tmp_path / "limit").write_text("1048576\n")
    assert machine_memory() == 1 << 20


def test_a_machine_needs_a_rate():
    with pytest.raises(ValueError, match="tflops"):
        Machine(0.0)
