"""The machine's numbers, and advice where a run asks for more."""

from __future__ import annotations

import sys

import pytest

from tl_vpd import VPDConfig
from tl_vpd.planning import Target, TransformerShape, footprint
from tl_vpd.planning.machine import ROWS, WIDTH, advice, machine_memory, matrix_tflops


def test_the_rate_is_that_of_matrix_products(monkeypatch):
    """A clock that goes on by a millisecond whenever it is read makes the rate known."""
    now = [0.0]

    def clock():
        now[0] += 1e-3
        return now[0]

    monkeypatch.setattr("time.perf_counter", clock)
    assert matrix_tflops() == pytest.approx(8 * 2 * ROWS * WIDTH**2 / 1e-3 / 1e12)


def test_memory_is_that_of_the_machine():
    with open("/proc/meminfo") as file:
        kilobytes = int(file.readline().split()[1])
    assert machine_memory() == pytest.approx(1024 * kilobytes, rel=0.02)


def test_advice_where_memory_or_time_is_short():
    assert advice(int(0.7 * 2**34), 2**34, 3600.0) == []
    assert advice(2**40, 0, 3600.0) == []  # unknown memory
    (memory,) = advice(2**35, 2**34, 3600.0)
    assert "needs 32.0 GiB and this machine has 16.0" in memory and "execution.micro_batch" in memory
    (hours,) = advice(1, 2**34, 50 * 3600.0)
    assert "takes 50 h" in hours and "vpd.steps" in hours


def test_a_plan_has_the_time_on_this_machine(monkeypatch):
    module = sys.modules["tl_vpd.planning.footprint"]  # the package has a function of this name
    monkeypatch.setattr(module, "matrix_tflops", lambda device: 0.05)
    monkeypatch.setattr(module, "machine_memory", lambda device: 2**34)
    target = Target.of(
        TransformerShape(layers=30, d_model=576, heads=9, kv_heads=3, d_mlp=1536, gated=True, vocabulary=49152)
    )
    whole = footprint(target, VPDConfig(batch_size=32), context=512)
    *_, time, memory, hours = whole.lines(20_000)
    assert "at 0.05 TFLOP per second, as this machine's matrix products were timed" in time
    assert f"{whole.step_flops / 0.05e12:.3g} s per step" in time
    assert "this machine has 16.0" in memory and hours.startswith("The run takes ")
    elsewhere = whole.lines(20_000, 200.0)
    assert elsewhere[-1].startswith("at 200 TFLOP per second: ")


def test_one_late_block_costs_little_of_the_target():
    """Its masked passes start there: only the clean pass runs all blocks."""
    target = Target.of(TransformerShape(layers=12, d_model=64, heads=4, d_mlp=256, vocabulary=100))
    costs = {
        layer: footprint(target, VPDConfig(sites=f"blocks.{layer}.*", batch_size=4), context=32).flops[
            "stochastic pass"
        ]
        for layer in (0, 11)
    }
    assert costs[11] < 0.35 * costs[0]
