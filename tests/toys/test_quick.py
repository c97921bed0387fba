"""Small toys decomposed for a few hundred steps: what the long runs finish has begun, and was not there at the start."""

from __future__ import annotations

import functools

import pytest

from tests.toys.easy import INDUCTION
from tl_vpd.baselines import METHODS
from tl_vpd.evaluation.ground_truth import GroundTruth, ground_truth
from tl_vpd.importance import GammaConfig
from tl_vpd.toys import TMS, TargetTraining, Toy, recipe, train

QUICK = dict(C=6, batch_size=8, init_scale=0.3, gamma=GammaConfig(kind="per_subcomponent_mlps", hidden=8))
SMALL = {identity: TMS(3, 2, identity=identity, training=TargetTraining(600, 4, 1e-2)) for identity in (False, True)}
target = functools.cache(train)


def decomposed(toy: TMS, method: str, steps: int) -> GroundTruth:
    name = "tms_5_2_id" if toy.identity else "tms_5_2"
    config = recipe(name, method, steps=steps).model_copy(update=QUICK)
    coefficients = config.coefficients.model_copy(update={"importance": 3e-3})
    optimizer = config.optimizer.model_copy(update={"lr": 1e-2})
    config = config.model_copy(update={"coefficients": coefficients, "optimizer": optimizer})
    return measured(toy, METHODS[method].run(target(toy), toy.batches(8, seed=0), config))


def measured(toy: Toy, found) -> GroundTruth:
    model = target(toy)
    return ground_truth(found, model, toy.batches(32, seed=9).at(0), toy.truth(model), output=toy.output)


@pytest.mark.parametrize(("method", "identity"), [("vpd", False), ("vpd", True), ("spd", False)])
def test_lengths_and_outputs_come_closer_to_the_truth(method, identity):
    start, end = (decomposed(SMALL[identity], method, steps) for steps in (5, 600))
    assert end.reconstruction["adversarial"] < 0.5 * end.reconstruction["zero"]
    assert end.reconstruction["adversarial"] < 0.7 * start.reconstruction["adversarial"]
    before, after = (quality.sites.set_index("site") for quality in (start, end))
    for site in ("embed", "unembed"):
        assert after.loc[site, "ml2r"] > 1.5 * before.loc[site, "ml2r"]
        assert after.loc[site, "mmcs"] > 0.93


@functools.cache
def induction(adversarial: bool) -> GroundTruth:
    gamma = GammaConfig(d_ci=32, n_blocks=1, n_heads=2, output_bias=1.0)
    config = recipe("induction", "vpd", steps=200)
    optimizer = config.optimizer.model_copy(update={"lr": 3e-3})
    config = config.model_copy(update=dict(C=16, batch_size=16, gamma=gamma, optimizer=optimizer))
    if not adversarial:
        without = config.coefficients.model_copy(update={"adversarial": 0.0})
        config = config.model_copy(update={"coefficients": without})
    return measured(INDUCTION, METHODS["vpd"].run(target(INDUCTION), INDUCTION.batches(16, seed=0), config))


def test_an_induction_circuit_is_important_where_it_is_needed():
    result = induction(adversarial=True)
    rows = result.needed.set_index("site").drop(index="blocks.1.attn.W_Q")  # needed nearly everywhere
    assert (rows["overlap"] > rows["chance"] + 0.25).all() and rows["overlap"].mean() > 0.65
    assert (rows["here"] > 3 * rows["elsewhere"]).all()
    assert result.reconstruction["adversarial"] < 0.15 * result.reconstruction["zero"]


def test_without_the_adversary_importances_are_in_their_places_and_do_not_hold():
    without, with_adversary = induction(adversarial=False), induction(adversarial=True)
    assert without.needed["overlap"].mean() > 0.7
    assert without.reconstruction["adversarial"] > 5 * with_adversary.reconstruction["adversarial"]
