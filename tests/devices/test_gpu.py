"""On a real GPU: steps and uses are those of a CPU, and random generators are left alone. ``make gpu`` runs these."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.devices.steps import RECIPES, steps
from tests.devices.uses import USES, close, numbers
from tests.tiny import decomposition_of, some_tokens, tiny_model
from tl_vpd.masking.row_random import RowRandom

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that this PyTorch can use"),
]
GPU = "cuda"
DRAWN_THERE = ("stochastic", "drawn Δ", "adversarial", "pruning", "evaluation", "decompose", "a file")
"""Uses whose random numbers a GPU draws itself, or that need none of it."""


@pytest.fixture
def numbers_of_a_cpu(monkeypatch):
    """A run's random numbers are drawn on the CPU, so that both devices have the same."""
    for name in ("rows", "uniform"):
        draw = getattr(RowRandom, name)

        def on_cpu(random, *arguments, draw=draw, **options):
            device, random.generator = random.generator.device, torch.Generator()
            try:
                return draw(random, *arguments, **options).to(device)
            finally:
                random.generator = torch.Generator(device)

        monkeypatch.setattr(RowRandom, name, on_cpu)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_a_step_is_that_of_a_cpu(name, padded, numbers_of_a_cpu):
    (metrics, left, _), (expected, true, _) = (steps(name, device, padded=padded) for device in (GPU, "cpu"))
    assert metrics == pytest.approx(expected, rel=1e-3, abs=1e-4)
    for a, b in zip(left, true, strict=True):
        assert (a - b).norm() <= 1e-3 * b.norm()


@pytest.mark.parametrize("name", [name for name in USES if name not in DRAWN_THERE])
def test_a_use_gives_what_it_gives_on_a_cpu(name):
    model, tokens = tiny_model(torch.float32), some_tokens()
    vpd = decomposition_of(model).float()
    there = copy.deepcopy(model).to(GPU), copy.deepcopy(vpd).to(GPU), tokens.to(GPU)
    expected, found = (dict(numbers(USES[name](*arguments))) for arguments in ((model, vpd, tokens), there))
    assert not [key for key, value in expected.items() if not close(found.get(key), value)]


@pytest.mark.parametrize("name", USES)
def test_random_generators_are_left_as_they_were(name):
    model = tiny_model(torch.float32).to(GPU)
    vpd = decomposition_of(model).float()
    before = torch.get_rng_state(), torch.cuda.get_rng_state()
    USES[name](model, vpd, some_tokens().to(GPU))
    assert all(
        torch.equal(a, b) for a, b in zip(before, (torch.get_rng_state(), torch.cuda.get_rng_state()), strict=True)
    )
