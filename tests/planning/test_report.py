"""A plan in words: the time of a step, what fits, and a first try that can be pasted into a recipe."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.tiny import GAMMA, decomposition_of, some_tokens, tiny_model
from tl_vpd import VPDConfig
from tl_vpd.planning import (
    Machine,
    Target,
    TransformerShape,
    first_try,
    footprint,
    plan_lines,
    seconds_per_step,
    yardstick,
)
from tl_vpd.planning.report import advice
from tl_vpd.recipe import DataRecipe
from tl_vpd.recipe.yaml_text import yaml_data

SMOLLM2 = TransformerShape(layers=30, d_model=576, heads=9, kv_heads=3, d_mlp=1536, gated=True, vocabulary=49152)
LAPTOP = Machine(0.05, memory=2**34, bfloat16=1.1, timed=True)


@pytest.fixture(scope="module")
def whole():
    return footprint(Target.of(SMOLLM2), VPDConfig(), context=512)


def test_a_run_that_is_too_large_says_what_fits(whole):
    *_, time, memory, long, largest, block, _, data, vpd, targeted = plan_lines(
        whole, LAPTOP, why="it needs more memory"
    )
    assert f"{whole.step_flops / 0.05e12:.3g} s at 0.05 TFLOP per second, as timed here" in time
    assert time.endswith("for 20,000 steps (no step was timed: it needs more memory).")
    assert memory == (
        f"The run needs {whole.total / 2**30:.1f} GiB (most of it: masked pass, sources) and this machine has 16.0."
    )
    assert long.startswith("The run takes ") and long.endswith(" or more.")
    assert largest.startswith("A first try on all blocks fits: ") and block.startswith(
        "A first try on the last block fits: "
    )
    assert "decompose_targeted" in targeted
    # What is to be pasted is the config that it was computed for.
    recipe = yaml_data(f"{data}\n{vpd}", "The advice")
    assert recipe["data"] == {"context": 64}
    config = VPDConfig(**recipe["vpd"])
    assert config == first_try(Target.of(SMOLLM2), sites=["blocks.29.*"])
    tried = footprint(Target.of(SMOLLM2), config, context=64)
    assert f"fits: {tried.total / 2**30:.1f} GiB" in block and tried.total < 0.8 * 2**34


def test_only_memory_is_short():
    target = Target.of(TransformerShape(layers=2, d_model=64, heads=4, d_mlp=256, vocabulary=100))
    cost = footprint(target, VPDConfig(steps=10, batch_size=64), context=256)
    assert advice(cost, Machine(1.0, memory=2 * cost.total)) == ["The run fits."]
    assert advice(cost, Machine(1.0, memory=2 * cost.total, bfloat16=2.0))[1].startswith(
        "Matrix products in bfloat16 are 2.0"
    )
    lines = advice(cost, Machine(1.0, memory=cost.total))
    assert "this machine has" in lines[0] and lines[1].startswith("It fits with execution.micro_batch=4: ")
    less = advice(cost, Machine(1.0, memory=cost.total // 4))
    assert "vpd.adversary.pool=8" in less[1]


def test_not_even_one_block_fits(whole):
    assert advice(whole, Machine(0.05, memory=2**28))[-2].startswith("Not even a first try on the last block fits")


def test_the_time_is_that_of_timed_steps(whole):
    *_, line = plan_lines(footprint(whole.target, VPDConfig(steps=100), context=8), Machine(0.05, timed=True), 3.0)
    assert line.startswith("A step takes 3 s, as timed here (") and line.endswith(": 5 min for 100 steps.")


def test_a_step_is_timed_on_the_model(monkeypatch):
    """A clock that goes on by a second whenever it is read: a step takes one."""
    now = [0.0]

    def clock():
        now[0] += 1.0
        return now[0]

    monkeypatch.setattr("time.perf_counter", clock)
    model = tiny_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    config = VPDConfig(steps=9, batch_size=2, C=4, gamma=GAMMA)
    assert seconds_per_step(model, config, context=6) == 1.0
    assert all(p.equal(before[name]) for name, p in model.named_parameters())


def test_a_first_try_counts_channels():
    target = Target.of(SMOLLM2)
    config = first_try(target, sites="blocks.29.*", steps=7, batch_size=3)
    assert {"*.W_Q": 576, "*.W_K": 192, "*.W_V": 192, "*.W_O": 576} | dict.fromkeys(
        ("*.W_gate", "*.W_in", "*.W_out"), 1536
    ) == config.C
    assert (config.steps, config.batch_size, config.sites, config.gamma.d_ci) == (7, 3, ("blocks.29.*",), 256)
    assert (config.coefficients.importance, config.coefficients.frequency) == (6e-4, 3e-4)
    small = first_try(target, sites="blocks.15.*", yardstick=0.2).coefficients
    assert (small.importance, small.frequency) == (4e-5, 2e-5)
    with pytest.raises(KeyError, match=r"blocks\.30"):
        first_try(target, sites="blocks.30.*")


def test_the_yardstick_is_what_ablating_costs():
    model, tokens = tiny_model(), some_tokens()
    with torch.no_grad():
        target = model(tokens).log_softmax(-1)
        with decomposition_of(model, sites=("blocks.1.*",)).double().attach(model) as attached, attached.masked("zero"):
            other = model(tokens).log_softmax(-1)
    kl = (target.exp() * (target - other)).sum(-1).mean()
    assert yardstick(model, tokens, sites="blocks.1.*") == pytest.approx(float(kl), rel=1e-9)


def test_rows_of_a_file_have_a_length(tmp_path):
    """A plan without a context reads it from the data; text is not read, and is cut to the model's context."""
    model, path = tiny_model(), tmp_path / "rows.npy"
    np.save(path, np.zeros((3, 7), dtype=np.int64))
    assert DataRecipe(tokens=str(path)).length(model) == 7
    assert DataRecipe(tokens=str(path), context=5).length(model) == 5
    assert DataRecipe(tokens="missing/*.txt").length(model) == 10
    with pytest.raises(FileNotFoundError, match="missing"):
        DataRecipe(tokens="missing.npy").length(model)
