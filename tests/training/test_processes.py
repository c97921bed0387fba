"""Runs as programs: two processes give what one gives, and a run that is killed or asked to end goes on bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tl_vpd.training.distributed.processes import World
from tl_vpd.training.micro_batch import split_batch

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def start(*arguments: object, processes: int = 1) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", "tests.training.a_run", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen) -> None:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err


def history(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(start(folder))
    return folder


def test_two_processes_give_the_losses_and_weights_of_one(undisturbed, tmp_path):
    finish(start(tmp_path / "two", processes=2))
    one, two = history(undisturbed), history(tmp_path / "two")
    assert len(one) == len(two) == 8
    for a, b in zip(one, two, strict=True):
        for field in ("stochastic", "adversarial", "importance", "frequency", "faithfulness", "total", "l0"):
            assert b[field] == pytest.approx(a[field], rel=2e-4), (a["step"], field)
    a, b = (load_file(f / "state" / "step-00000008.safetensors") for f in (undisturbed, tmp_path / "two"))
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].shape == b[key].shape
        if key.startswith("parts/"):
            # Adam gives an entry whose gradient is rounding noise a full-length step.
            assert float((a[key] - b[key]).abs().gt(1e-4).float().mean()) < 0.05, key


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_ended_goes_on_bit_for_bit(undisturbed, tmp_path, number):
    folder = tmp_path / "run"
    process = start(folder, "slow")
    assert process.stdout is not None
    while process.stdout.readline().strip() != "3":
        assert process.poll() is None, process.communicate()
    process.send_signal(number)
    process.communicate(timeout=300)
    assert not (folder / "decomposition").exists()
    saved = sorted(p.name for p in (folder / "state").iterdir() if p.suffix == ".safetensors")
    if number == signal.SIGTERM:  # the step at hand was finished, and the run ended by itself
        assert process.returncode == 0 and saved[-1] in ("step-00000003.safetensors", "step-00000004.safetensors")
    finish(start(folder, "resume"))
    for name in ("decomposition/decomposition.safetensors", "state/step-00000008.safetensors"):
        a, b = load_file(undisturbed / name), load_file(folder / name)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name
    assert history(folder) == history(undisturbed)


def test_rows_are_split_evenly_or_not_at_all():
    assert list(World(1, 4).rows(8)) == [2, 3]
    with pytest.raises(ValueError, match="batch_size 6 cannot be split evenly over 4 processes"):
        World(0, 4).rows(6)


def test_what_a_row_is_does_not_depend_on_how_the_batch_is_split():
    whole = split_batch(range(8), None, merged=0.5)
    halves = [split_batch(World(rank, 2).rows(8), 2, merged=0.5) for rank in (0, 1)]
    assert [*halves[0].attacked, *halves[1].attacked] == whole.attacked == [0, 2, 4, 6]
    assert [*halves[0].stochastic, *halves[1].stochastic] == whole.stochastic == [1, 3, 5, 7]
    assert whole.micro_batches[0].order.tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert [p.order.tolist() for p in halves[1].micro_batches] == [[0, 1], [2, 3]]
    assert [(p.attacked, p.stochastic) for p in halves[1].micro_batches] == [
        (slice(0, 1), slice(0, 1)),
        (slice(1, 2), slice(1, 2)),
    ]
    most = split_batch(range(20), None, merged=0.9)
    assert most.stochastic == [9, 19] and len(most.attacked) == 18
    assert (
        split_batch(range(100), None, merged=0.55).attacked[-1] == 98
    )  # 55 of them: 100 · 0.55 is more than 55 in floats
    assert len(split_batch(range(100), None, merged=0.55).attacked) == 55
    with pytest.raises(ValueError, match=r"merged=0.9 needs rows of both kinds .* one has 4 rows: .* at least 10"):
        split_batch(range(4), 4, merged=0.9)
