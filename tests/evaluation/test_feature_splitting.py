"""Decompositions of several sizes, and the runs that train them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.evaluation import handmade
from tests.evaluation.handmade import KNOWN, one_token_rows
from tests.tiny import GAMMA, some_tokens, tiny_model
from tl_vpd import SavingConfig, VPDConfig
from tl_vpd.evaluation import alive_subcomponents, decompose_at_sizes, feature_splitting


def test_sizes_count_the_living():
    model = handmade.known_model()
    right, lookup = handmade.right(model), handmade.lookup_table(model)
    tokens = one_token_rows(0, KNOWN)
    table = feature_splitting({"right": right, "again": right, "table": lookup}, model, tokens)
    alive = sum(int(values.sum()) for values in alive_subcomponents(right, model, tokens).values())
    assert list(table["alive"]) == [alive, alive, 2 * KNOWN]
    assert table.loc["again", "alive_growth"] == 1.0
    assert table.loc["right", "rounded_kl"] < 1e-5


def test_runs_scale_C_goes_on_and_refuses_other_settings(tmp_path: Path):
    model, tokens = tiny_model(torch.float32), some_tokens(shape=(4, 6))
    config = VPDConfig(
        steps=1, batch_size=2, C=4, gamma=GAMMA, faithfulness={"warm_up_steps": 0}, sites=("blocks.0.mlp.*",)
    )
    runs = decompose_at_sizes(
        model, tokens, config, factors=(0.1, 0.5, 2), saving=SavingConfig(folder=tmp_path), progress=False
    )
    assert [set(vpd.counts.values()) for vpd in runs.values()] == [{1}, {2}, {8}]
    again = decompose_at_sizes(
        model, tokens, config, factors=(0.5,), saving=SavingConfig(folder=tmp_path), progress=False
    )
    for name in again[0.5].sites:
        assert torch.equal(again[0.5].V[name], runs[0.5].V[name])
    other = config.model_copy(update={"steps": 2})
    with pytest.raises(ValueError, match="other settings"):
        decompose_at_sizes(model, tokens, other, factors=(0.5,), saving=SavingConfig(folder=tmp_path), progress=False)
    table = feature_splitting(runs, model, tokens)
    assert list(table["built"]) == [2, 4, 16]


def test_sizes_go_on_where_a_first_state_was_cut_off(tmp_path: Path):
    model = tiny_model(torch.float32)
    config = VPDConfig(steps=2, batch_size=2, C=2, gamma=GAMMA, faithfulness={"warm_up_steps": 0})
    (tmp_path / "C-1" / "state").mkdir(parents=True)
    (tmp_path / "C-1" / "state" / ".step-00000000.safetensors.1.tmp").write_bytes(b"cut")
    runs = decompose_at_sizes(
        model, some_tokens(shape=(4, 6)), config, factors=[1], saving=SavingConfig(folder=tmp_path), progress=False
    )
    assert list(runs) == [1]
