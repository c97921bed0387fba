"""Targeted toys: the streams, and the count of what serves the target, by hand."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from benchmarks.targeted_toys import features_report, streams, targeted_recipe
from tl_vpd.adapters import adapt
from tl_vpd.toys import TMS, TOYS, train
from tl_vpd.training import decompose_targeted, new_decomposition


def test_the_target_stream_has_the_chosen_features_alone():
    target, ordinary = (stream.at(3) for stream in streams(TOYS["tms_5_2_id"], (0, 3), 64, seed=5))
    on = (target != 0).float().mean((0, 1))
    assert on[[1, 2, 4]].tolist() == [0, 0, 0] and on[[0, 3]].tolist() == pytest.approx([1 / 3, 1 / 3], abs=0.03)
    assert (ordinary != 0).float().mean((0, 1)).tolist() == pytest.approx([0.05] * 5, abs=0.02)


def test_a_feature_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"only=\(5,\): the features are 0 to 4"):
        streams(TOYS["tms_5_2_id"], (5,), 4)


@pytest.mark.parametrize("naive", [False, True])
def test_recipes(naive):
    for toy in ("tms_5_2_id", "compressed"):
        config = targeted_recipe(toy, seed=3, steps=7, naive=naive)
        assert config.steps == 7 and config.seed == 3 and bool(config.coefficients.nontarget) != naive
    with pytest.raises(KeyError, match="no targeted recipe for 'induction'"):
        targeted_recipe("induction")


@torch.no_grad()
def test_what_serves_the_target_is_counted_by_hand():
    """Subcomponents 0 and 1 read features 2 and 4; the others read nothing."""
    toy = TMS(5, 2)
    model = toy.build()
    config = targeted_recipe("tms_5_2_id").model_copy(
        update={"C": 4, "sites": "embed", "gamma": {"kind": "per_subcomponent_mlps", "hidden": 1}}
    )
    vpd = new_decomposition(model, config)
    vpd.V["embed"].zero_()
    vpd.V["embed"][2, 0] = vpd.V["embed"][4, 1] = 1.0
    for parameter, value in zip(vpd.gamma.parameters(), (10.0, 0.0, 1.0, -1.0), strict=True):
        parameter.fill_(value)  # z = GELU(10 a) − 1
    assert features_report(vpd, model, toy, (2,)).loc["embed"].to_dict() == {
        "for_target": 1, "built": 4, "other_features": 1, "others": 4, "damage": 0.0
    }  # fmt: skip
    report = features_report(vpd, model, toy, (2, 4)).loc["embed"]
    assert report["for_target"] == 2 and report["other_features"] == 0
    vpd.V["embed"][1, 0] = 0.5  # the subcomponent of feature 2 reads feature 1 too
    without, rows = deepcopy(model), replace(toy.batches(64, seed=-3), only=(0, 1, 3, 4)).at(0)
    adapt(without).weight("embed").sub_(vpd.V["embed"][:, :1] @ vpd.U["embed"][:1])
    expected = (without(rows) - model(rows)).square().mean() / model(rows).square().mean()
    damage = features_report(vpd, model, toy, (2,)).loc["embed", "damage"]
    assert damage == pytest.approx(float(expected), rel=1e-4) and damage > 1e-3


def test_one_feature_needs_one_subcomponent_in_each_matrix_and_none_for_the_others():
    toy = TMS(5, 2, identity=True, vectors=16)
    model = train(toy, 0, steps=4_000)
    config = targeted_recipe("tms_5_2_id", steps=1_000).model_copy(update={"batch_size": 8})
    run = decompose_targeted(model, *streams(toy, (1,), 8), config, progress=False)
    report = features_report(run.decomposition, model, toy, (1,))
    assert report["for_target"].to_dict() == {"embed": 1, "identity": 1, "unembed": 1}
    assert report["other_features"].to_dict() == {"embed": 0, "identity": 0, "unembed": 0}
