"""The benchmark for a GPU, by the same path on a CPU and a tiny size; where no GPU is, it says so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.models import VARIANTS, Size

TINY = Size(16, 32, 11, 2, 8, (4, 4, 4, 4, 8, 8), 16, 32, layers=1, heads=2, blocks=1)


def test_every_figure_is_there(monkeypatch):
    monkeypatch.setitem(VARIANTS, "compiled_bfloat16", ({}, {"compile": "no such backend"}))
    monkeypatch.setattr(gpu, "NAMES", ("bfloat16", "merged_bfloat16", "compiled_bfloat16"))
    record = gpu.measure(TINY, torch.device("cpu"), minutes=5, steps=1)
    assert record["left_out"] == [] and record["peak_tflops"] > 0
    for name in ("bfloat16", "merged_bfloat16"):
        figures = record[name]
        assert set(figures) == {"steps_per_s", "first_step_s", "total_s", "peak_share", "peak_gb"}
        flops = figures["peak_share"] * record["peak_tflops"] * 1e12 / figures["steps_per_s"]
        assert flops == pytest.approx(gpu.flops_of(TINY, name)) and min(figures.values()) > 0
    assert "no such backend" in record["compiled_bfloat16"]["failed"]
    assert gpu.measure(TINY, torch.device("cpu"), minutes=0)["left_out"] == list(gpu.NAMES)


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="what the command says without a GPU can only be seen without one"
)
def test_where_no_gpu_is_it_says_so(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path / "gpu.json")],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1 and done.stderr == "There is no GPU that this PyTorch can use: nothing was measured.\n"
    assert not (tmp_path / "gpu.json").exists()
