"""A run that cannot fit in memory is refused before anything is made."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import GAMMA, some_tokens, tiny_model
from tl_vpd import ExecutionConfig, SavingConfig, VPDConfig, decompose
from tl_vpd.planning import Target, footprint
from tl_vpd.training import fits

CONFIG = VPDConfig(steps=1, batch_size=8, C=64, gamma=GAMMA)


def available(monkeypatch, size):
    monkeypatch.setattr(fits, "machine_memory", lambda device: int(size))


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_what_is_counted_is_part_of_the_plan(monkeypatch, micro_batch, tmp_path):
    """The plan has everything that is counted, so that a run that the plan fits is never refused."""
    model, execution = tiny_model(dtype=torch.float32), ExecutionConfig(micro_batch=micro_batch)
    planned = footprint(Target.of(model), CONFIG, context=10, execution=execution)
    sure = sum(planned.bytes[part] for part in ("target", "parameters", "gradients", "moments", "sources"))
    tokens = some_tokens(shape=(8, 10))
    available(monkeypatch, sure)  # values and activations come on top
    saving = SavingConfig(folder=tmp_path / "run")
    with pytest.raises(ValueError, match=r"^The run needs 0\.0 GiB or more and there are 0\.0: [^\n]*\.$"):
        decompose(model, tokens, CONFIG, execution=execution, saving=saving, progress=False)
    assert not (tmp_path / "run").exists()
    available(monkeypatch, planned.total)
    assert decompose(model, tokens, CONFIG, execution=execution, progress=False).finished


@pytest.mark.parametrize(
    ("part", "remedy"),
    [
        (0.765, "with micro_batch=1 it is"),
        (0.4, r"with sites='blocks\.1\.\*', micro_batch=1 and adversary\.pool=8 it is"),
        (0.05, "decompose fewer sites with a smaller C"),
    ],
)
def test_it_says_what_fits(monkeypatch, part, remedy):
    model = tiny_model(dtype=torch.float32)
    available(monkeypatch, part * footprint(Target.of(model), CONFIG, context=10).total)
    with pytest.raises(ValueError, match=remedy):
        decompose(model, some_tokens(shape=(8, 10)), CONFIG, progress=False)


def test_unknown_memory_refuses_nothing(monkeypatch):
    available(monkeypatch, 0)
    assert decompose(tiny_model(dtype=torch.float32), some_tokens(shape=(8, 10)), CONFIG, progress=False).finished
