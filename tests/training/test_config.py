"""The config: refusals, and how C is found for every site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny import tiny_model
from tl_vpd import VPDConfig
from tl_vpd.adapters import adapt
from tl_vpd.baselines import SPDConfig
from tl_vpd.site import Site
from tl_vpd.training.config import (
    AdversaryConfig,
    Coefficients,
    ExecutionConfig,
    FaithfulnessConfig,
    MinimalityConfig,
    OptimizerConfig,
    SavingConfig,
    counts_for,
    default_count,
)
from tl_vpd.training.stored_config import upgraded


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"step": 3}, r"VPDConfig has no 'step' \(did you mean 'steps'\?\): its fields are steps, batch_size"),
        (
            {"coefficients": {"freq": 1}},
            "VPDConfig: coefficients.*: Coefficients has no 'freq' .did you mean 'frequency'",
        ),
        ({"steps": 0}, "VPDConfig: steps=0: Input should be greater than or equal to 1"),
        ({"batch_size": 0}, "greater than or equal to 1"),
        ({"C": 0}, "C of every site is 0"),
        ({"C": {"*.W_Q": 0}}, r"C of \*\.W_Q is 0"),
        ({"lr": 1e-3}, "VPDConfig has no 'lr'"),
        ({"optimizer": {"lr": 0.0}}, "optimizer.lr=0.0: .*greater than 0"),
        ({"optimizer": {"lr_final": 2.0}}, "less than or equal to 1"),
        ({"minimality": {"smooth": 0.1}}, r"smooth=\(\(0.0, 0.1\),\) would do nothing: it belongs to kind='smooth_l0'"),
        ({"minimality": {"normalised": True}}, "normalised=True would do nothing: it belongs to kind='smooth_l0'"),
        (
            {"minimality": {"kind": "smooth_l0", "p": 1}},
            r"p=\(\(0.0, 1.0\),\) would do nothing: it belongs to kind='power'",
        ),
        ({"minimality": {"p": ((0, 2), (1, 0))}}, r"p=\(\(0.0, 2.0\), \(1.0, 0.0\)\): its values must be above 0"),
        ({"minimality": {"p": ((0, 2), (0, 1))}}, "the fractions of the run must rise from knot to knot"),
        ({"minimality": {"p": ()}}, "at least 1 item"),
        ({"minimality": {"p": ((0, 2), (1.5, 1))}}, "less than or equal to 1"),
        ({"optimizer": {"lr_schedule": ((0, -1),)}}, "greater than or equal to 0"),
        ({"coefficients": {"schedule": {"freq": 1}}}, "coefficients.schedule.freq.*: Input should be 'delta'"),
        ({"coefficients": {"schedule": {"delta": True}}}, "Input should be a valid tuple"),
        ({"locality": 1}, r"locality=\(\(0.0, 1.0\),\) would do nothing: coefficients.locality is 0"),
        ({"locality": 0, "coefficients": {"locality": 1e-5}}, "its values must be above 0"),
        ({"optimizer": {"momentum": 0.5}}, "momentum=0.5 would do nothing: it belongs to kind='muon'"),
        ({"merged": 0.5, "adversary": {"start": 0.2}}, "adversary.start=0.2 cannot be combined with merged=0.5"),
        ({"merged": 1.0}, "merged=1.0: Input should be less than 1"),
        ({"adversary": {"start": 1.0}}, "adversary.start=1.0: Input should be less than 1"),
        ({"stochastic_routing": "some"}, "'all' or 'uniform_k'"),
        ({"gamma": {"kind": "oracle"}}, "shared_transformer"),
        ({"sites": ()}, "sites"),
        ({"steps": True}, "steps=True: Input should be a valid integer"),
        ({"steps": "5"}, "steps='5': Input should be a valid integer"),
        ({"steps": 5.0}, "steps=5.0: Input should be a valid integer"),
        ({"seed": 1 << 64}, "seed=18446744073709551616: Input should be less than or equal"),
        ({"seed": 10**5000}, "seed=.*thousands of digits: Input should be"),
        ({"adversary": {"betas": (0.5, 1.0)}}, r"adversary\.betas\.1=1\.0: Input should be less than 1"),
        ({"optimizer": {"lr": float("nan")}}, "optimizer.lr=nan: Input should be a finite number"),
        ({"optimizer": {"lr": "1e-3"}}, "optimizer.lr='1e-3': Input should be a valid number"),
        ({"merged": True}, "merged=True: Input should be a valid number"),
        ({"gamma": {"output_bias": float("inf")}}, "gamma.output_bias=inf: Input should be a finite number"),
        ({"C": True}, "C.*=True: Input should be a valid integer"),
    ],
)
def test_wrong_fields_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message) as refused:
        VPDConfig(**fields)
    assert "\n" not in str(refused.value) and str(refused.value).endswith(".")


@pytest.mark.parametrize("field", [{"precision": "float16"}, {"sharding": "most"}, {"micro_batch": 0}])
def test_a_copy_is_checked_as_a_new_config_is(field):
    with pytest.raises(ValueError, match=f"ExecutionConfig: {next(iter(field))}="):
        ExecutionConfig().model_copy(update=field)
    assert ExecutionConfig().model_copy(update={"micro_batch": 2}) == ExecutionConfig(micro_batch=2)


def test_numbers_of_numpy_and_pytorch_count_as_numbers():
    config = VPDConfig(
        seed=np.int64(3), C={"*": np.uint8(4)}, batch_size=torch.tensor(8), optimizer={"lr": np.float32(0.5)}
    )
    assert config == VPDConfig(seed=3, C={"*": 4}, batch_size=8, optimizer={"lr": 0.5})
    assert [type(v) for v in (config.seed, config.batch_size, config.optimizer.lr)] == [int, int, float]


def test_a_folder_below_home_is_there(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert SavingConfig(folder="~/runs").folder == Path("/somewhere/runs")


@pytest.mark.parametrize("name", ["save_every", "log_every", "keep_states"])
def test_saving_needs_counts_of_at_least_1(name):
    with pytest.raises(ValueError, match=f"{name}=0: .*greater than or equal to 1"):
        SavingConfig(folder="somewhere", **{name: 0})


@pytest.mark.parametrize("name", ["save_every", "keep_states"])
def test_saving_without_a_folder_would_do_nothing(name):
    with pytest.raises(ValueError, match=f"{name}=7 would do nothing: without folder nothing is written"):
        SavingConfig(**{name: 7})
    assert SavingConfig(log_every=7).folder is None  # rows of metrics are returned too


@pytest.mark.parametrize("other", [{"checkpoint": True}, {"sharding": "full"}, {"sharding": "optimizer"}])
def test_compiled_passes_go_with_neither_checkpoint_nor_sharding(other):
    with pytest.raises(ValueError, match="compile=True cannot be combined with checkpoint=True or with sharding"):
        ExecutionConfig(compile=True, **other)
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        ExecutionConfig(micro_batch=0)


OLD: dict[str, Any] = {
    "steps": 7000,
    "batch_size": 8,
    "seed": 3,
    "sites": ["*.attn.*"],
    "C": {"*.W_[QK]": 96, "*.W_[VO]": 128},
    "tied": [["a", "b"]],
    "init": "channels",
    "init_scale": 0.5,
    "gamma": {"kind": "shared_transformer", "d_ci": 192, "n_blocks": 2, "n_heads": 4, "output_bias": 0.8},
    "lr": 0.001,
    "gamma_lr": 0.002,
    "lr_final": 0.2,
    "coefficients": {"delta": 1e5, "importance": 6e-4, "frequency": 3e-4},
    "p_start": 2.5,
    "p_end": 0.5,
    "minimality": "power",
    "smooth_start": 1.0,
    "smooth_end": 0.01,
    "smooth_share": 0.9,
    "frequency_reference": 32.0,
    "frequency_half_life": 200.0,
    "forward_slope": 0.0,
    "minimality_warm_up": 0.3,
    "stochastic_routing": "all",
    "merged": True,
    "adversary": {"inner_steps": 1, "lr": 0.02, "pool": 4},
    "faithfulness": "relative",
    "clip": None,
    "warm_up_steps": 40,
    "warm_up_lr": 0.003,
    "output": "mse",
}
"""A flat config, as states and records once held it; every field differs from its default, but for those without effect."""


def test_a_flat_config_of_an_old_state_is_read():
    config = VPDConfig(**upgraded(OLD))
    assert config.minimality == MinimalityConfig(
        p=((0, 2.5), (1, 0.5)), frequency_reference=32.0, frequency_half_life=200.0
    )
    assert config.optimizer == OptimizerConfig(lr=1e-3, gamma_lr=2e-3, lr_final=0.2, clip=None)
    assert config.faithfulness == FaithfulnessConfig(kind="relative", warm_up_steps=40, warm_up_lr=3e-3)
    assert (config.steps, config.seed, config.init_scale, config.merged, config.output) == (7000, 3, 0.5, 0.5, "mse")
    assert config.adversary == AdversaryConfig(inner_steps=1, lr=0.02, pool=4) and config.tied == (("a", "b"),)
    rising = ((0, 0), (0.3, 1))
    assert config.coefficients.schedule == {"importance": rising, "frequency": rising}
    assert config.coefficients.importance == 6e-4 and config.gamma.d_ci == 192 and config.C["*.W_[QK]"] == 96


def test_what_had_no_effect_in_a_flat_config_is_left_out():
    smooth = VPDConfig(**upgraded({**OLD, "minimality": "smooth_l0", "smooth_end": 0.1})).minimality
    assert (smooth.kind, smooth.smooth, smooth.p) == ("smooth_l0", ((0, 1), (0.9, 0.1)), ((0, 2), (1, 0.4)))
    assert VPDConfig(**upgraded({**OLD, "smooth_end": 0.1})).minimality.smooth == ((0, 1), (0.9, 0.01))


def test_nested_configs_and_those_of_few_settings_are_read_as_they_are():
    config = VPDConfig(steps=3, minimality={"kind": "smooth_l0", "smooth": 0.1}, optimizer={"lr": 1e-2})
    assert VPDConfig(**upgraded(config.model_dump(mode="json"))) == config
    old = {"minimality": {"kind": "smooth_l0", "smooth_end": 0.1, "p_end": 0.4, "warm_up": 0.2}, "merged": False}
    assert VPDConfig(**upgraded({**old, "coefficients": {"delta": 5.0}})) == VPDConfig(
        minimality={"kind": "smooth_l0", "smooth": ((0, 1), (0.9, 0.1))},
        coefficients={"delta": 5.0, "schedule": dict.fromkeys(("importance", "frequency"), ((0, 0), (0.2, 1)))},
    )
    assert upgraded(old) and old["minimality"]["warm_up"] == 0.2  # what was read stays as it is
    assert VPDConfig(**upgraded({"steps": 5})) == VPDConfig(steps=5)
    assert SPDConfig(**upgraded({"forward_slope": 0.01, "lr": 1e-2})).forward_slope == 0.01


def test_a_setting_that_never_was_is_refused():
    with pytest.raises(ValueError, match="forward_slope"):
        VPDConfig(**upgraded({**OLD, "forward_slope": 0.01}))
    with pytest.raises(ValueError, match="joined"):
        VPDConfig(**upgraded({**OLD, "joined": True}))


def test_configs_are_frozen_and_come_back_from_json():
    config = VPDConfig(C={"*.attn.*": 3, "*": 5}, sites="*.attn.*", adversary=AdversaryConfig(routing="uniform_k"))
    assert config.sites == ("*.attn.*",)
    assert VPDConfig.model_validate_json(config.model_dump_json()) == config
    with pytest.raises(TypeError, match="VPDConfig cannot be changed: make a copy"):
        config.steps = 3
    assert Coefficients() == Coefficients(delta=1e7, stochastic=0.5, adversarial=0.5, importance=2e-4, frequency=1e-4)


def test_counts_by_number_pattern_and_proportion():
    sites = adapt(tiny_model()).sites
    assert set(counts_for(VPDConfig(C=7), sites).values()) == {7}
    by_pattern = counts_for(VPDConfig(C={"*.attn.*": 3, "*.mlp.*": 5, "blocks.1.mlp.W_in": 9}), sites)
    assert by_pattern["blocks.0.attn.W_O"] == 3 and by_pattern["blocks.0.mlp.W_in"] == 5
    assert by_pattern["blocks.1.mlp.W_in"] == 9
    specific = counts_for(VPDConfig(C={"*.W_[QK]": 64, "*": 256}), sites)
    assert {C for name, C in specific.items() if name.endswith(("W_Q", "W_K"))} == {64}
    assert {C for name, C in specific.items() if not name.endswith(("W_Q", "W_K"))} == {256}
    assert counts_for(VPDConfig(), sites)["blocks.0.mlp.W_in"] == 12


@pytest.mark.parametrize(
    ("weight", "d_in", "d_out", "expected"),
    [
        ("attn.W_Q", 768, 768, 512),
        ("attn.W_V", 768, 768, 1024),
        ("mlp.W_in", 768, 3072, 3072),
        ("mlp.W_out", 3072, 768, 3584),
    ],
)
def test_default_counts_are_the_papers(weight, d_in, d_out, expected):
    assert default_count(Site(f"blocks.0.{weight}", d_in, d_out)) == expected
