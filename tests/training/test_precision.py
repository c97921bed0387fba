"""A precision that a processor would imitate is refused, before anything is made."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tl_vpd import ExecutionConfig, SavingConfig, decompose
from tl_vpd.planning import machine
from tl_vpd.training import precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("names", "has"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, True),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"avx512_bf16": False, "amx_bf16": False, "avx_ne_convert": True}, True),
        ({"avx512_bf16": False, "amx_bf16": False, "avx_ne_convert": False}, False),
        ({"neon": True, "arm_bf16": True}, True),
        ({"neon": True}, True),  # PyTorch does not say
    ],
)
def test_a_processor_is_asked(probe, monkeypatch, names, has):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, **names}, raising=False)
    assert probe("cpu") is has


def test_a_gpu_is_asked_without_emulation(probe, monkeypatch):
    asked = []
    monkeypatch.setattr(
        torch, "cuda", SimpleNamespace(is_bf16_supported=lambda including_emulation: asked.append(including_emulation))
    )
    assert probe("cuda") is False and asked == [False]


def test_a_run_is_refused_with_the_reason_and_writes_nothing(target, rows, config, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: False)
    message = (
        r"^precision='bfloat16' needs a processor with instructions for it .* has none, .*: leave precision out\.$"
    )
    with pytest.raises(ValueError, match=message):
        decompose(
            target,
            rows,
            config,
            execution=ExecutionConfig(precision="bfloat16"),
            saving=SavingConfig(folder=tmp_path / "run"),
            progress=False,
        )
    assert not (tmp_path / "run").exists()
    precision.refuse_imitated("float32", CPU)


def test_a_plan_does_not_time_what_would_be_imitated(monkeypatch):
    monkeypatch.setattr(machine, "has_bfloat16", lambda device: False)
    monkeypatch.setattr(machine, "matrix_tflops", lambda device, dtype=torch.float32: {torch.float32: 2.0}[dtype])
    assert machine.Machine.here().bfloat16 is None
