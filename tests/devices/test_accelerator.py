"""Every use on an accelerator made in Python: no operation mixes devices, and a step waits for the device twice at most.

An operation that mixes devices raises there, and ends the program whose report these tests read.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def report():
    done = subprocess.run(
        [sys.executable, "-m", "tests.devices"],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_accelerator_notices_what_a_gpu_would_wait_for_and_refuses_two_devices(report):
    waits = {
        kind.rpartition(" ")[0].partition(" elsewhere")[0]: n for kind, n in report["accelerator"]["waits"].items()
    }
    assert waits == {
        "item": 1,
        "nonzero": 1,
        "mask as an index": 1,
        "index on the CPU": 1,
        "copy to cpu": 1,
        "copy to toygpu": 2,
    }
    assert "tensors on the CPU and on toygpu" in report["accelerator"]["refused"]
    assert any(kind.startswith("aten.ones.default") for kind in report["accelerator"]["on_cpu"])


def test_a_step_of_every_recipe_waits_twice_at_most(report):
    steps = report["steps"]
    assert len(steps) > 20 and not [name for name, step in steps.items() if not step["waits"]]
    assert not {name: step["waits"] for name, step in steps.items() if sum(step["waits"].values()) > 2}


def test_a_step_makes_no_tensor_on_the_cpu(report):
    """But those that the numbers it has waited for come in."""
    others = {
        f"{name}: {what}"
        for name, step in report["steps"].items()
        for what in step["on_cpu"]
        if "masking/routing.py" not in what
    }
    assert not others


def test_a_step_of_every_recipe_is_that_of_a_cpu(report):
    assert not {name: step["error"] for name, step in report["steps"].items() if not step["error"] < 1e-3}


def test_every_use_gives_what_it_gives_on_a_cpu(report):
    uses = report["uses"]
    assert len(uses) > 20 and all(use["numbers"] for use in uses.values())
    assert not {name: use["wrong"] for name, use in uses.items() if use["wrong"]}


def test_masked_forward_passes_do_not_wait(report):
    modes = ("unmasked", "rounded", "ci", "zero", "stochastic", "drawn Δ")
    assert not {name: report["uses"][name] for name in modes if report["uses"][name]["waits"]}
    assert not {name: report["uses"][name] for name in modes if report["uses"][name]["on_cpu"]}
    assert report["uses"]["adversarial"]["waits"]  # it reads the loss of each of its steps
