from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from tests.tiny import GAMMA, decomposition_of, some_tokens, tiny_model
from tl_vpd import EvaluationConfig, evaluate
from tl_vpd.evaluation import sampled
from tl_vpd.evaluation.batch import BatchStore
from tl_vpd.evaluation.controls import (
    random_importances,
    reassigned,
    shuffled_control,
    shuffled_importances,
    singular_components,
    singular_importances,
    untrained_control,
)
from tl_vpd.evaluation.nulls import untrained
from tl_vpd.site import ConcatenatedAxis, Site

IN, OUT = "blocks.0.mlp.W_in", "blocks.0.mlp.W_out"


def test_reassigned_by_hand():
    values = torch.tensor([[[0.2, 0.0, 0.9]]])
    strength = torch.tensor([[[5.0, 7.0, 1.0, 6.0]]])
    assert_close(reassigned(values, strength), torch.tensor([[[0.0, 0.9, 0.0, 0.2]]]))


def test_reassigned_to_fewer_pieces_drops_the_smallest():
    values = torch.tensor([[[0.3, 0.5, 0.1]]])
    assert_close(reassigned(values, torch.tensor([[[1.0, 2.0]]])), torch.tensor([[[0.3, 0.5]]]))


def test_random_importances_keep_each_sites_values_and_spare_the_dead():
    site_axis = ConcatenatedAxis({IN: 6, OUT: 4})
    g = torch.rand(2, 3, 10).clamp_min(0.3) * (torch.rand(2, 3, 10) > 0.6)
    alive = torch.ones(10, dtype=torch.bool)
    g[..., 5], alive[5] = 0.0, False
    result = random_importances(g, alive, site_axis, torch.rand(g.shape, generator=torch.Generator().manual_seed(0)))
    for name in site_axis.names:
        moved, theirs = site_axis.split_sites(result)[name], site_axis.split_sites(g)[name]
        assert_close(moved.sort(-1).values, theirs.sort(-1).values)
    assert (result[..., 5] == 0).all()
    assert not torch.equal(result, g)


def test_singular_directions_sum_to_the_weight_and_the_strongest_is_kept():
    W = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    parts = singular_components({IN: Site(IN, 3, 3)}, {IN: W})
    assert_close(parts.V[IN] @ parts.U[IN], W, atol=1e-6, rtol=0)
    # x has 1 along the second direction (strength 2) and 0.5 along the first (strength 1.5).
    x = torch.tensor([[[0.5, 1.0, 0.0]]])
    g = torch.tensor([[[0.0, 0.0, 0.0, 0.7]]])
    result = singular_importances(g, ConcatenatedAxis({IN: 4}), {IN: x}, parts)
    assert_close(result, torch.tensor([[[0.0, 0.7, 0.0]]]))


def test_shuffled_importances_stay_whole_and_leave_padding():
    g = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(0))
    real = torch.tensor([[True, True, True, False], [True, True, False, False]])
    g = g * real[..., None]
    order = torch.tensor([[0.3, 0.2, 0.1, 0.0], [0.5, 0.4, 0.0, 0.1]])
    result = shuffled_importances(g, real, real, order)
    expected = torch.stack([g[0, [2, 1, 0, 3]], g[1, [1, 0, 2, 3]]])  # whole tokens, the smallest order first
    assert torch.equal(result, expected)
    # A row with more tokens than its partner takes them again from the first; one with fewer leaves the last out.
    other = shuffled_importances(g, real, real.flip(0), order)
    assert torch.equal(other[0], torch.stack([g[0, 2], g[0, 1], *torch.zeros(2, 5)]))
    assert torch.equal(other[1], torch.stack([g[1, 1], g[1, 0], g[1, 1], torch.zeros(5)]))
    no_positions = shuffled_importances(g[:, 0], real[:, 0], real[:, 0], order[:, 0])
    assert torch.equal(no_positions, g[:, 0])


def test_shuffled_control_permutes_the_tokens_of_all_rows_whatever_the_batches():
    model = tiny_model(torch.float32)
    vpd, tokens = decomposition_of(model), some_tokens(shape=(5, 6))
    moved = []
    for batch_size in (2, 5):
        with sampled(vpd, model, tokens, batch_size=batch_size) as sample:
            g = torch.cat([batch.g for batch in sample.batches()])
            control = replace(
                sample, importances=shuffled_control(sample.importances, sample.rows), store=BatchStore(0)
            )
            moved.append(torch.cat([batch.g for batch in control.batches()]))
    assert_close(moved[0], moved[1])
    assert sorted(moved[0].flatten(0, 1).sum(-1).tolist()) == pytest.approx(sorted(g.flatten(0, 1).sum(-1).tolist()))
    assert not torch.equal(moved[0].sum((1, 2)), g.sum((1, 2)))  # rows too have changed places


@pytest.mark.parametrize("n", [2, 3, 4])
def test_shuffled_control_takes_no_rows_importances_from_that_row(n: int):
    model = tiny_model(torch.float32)
    vpd, tokens = decomposition_of(model), some_tokens(shape=(n, 6))
    for seed in range(5):
        with sampled(vpd, model, tokens, seed=seed) as sample:
            g = next(sample.batches()).g
            moved = shuffled_control(sample.importances, sample.rows)(sample, sample.rows, {})
        sums, theirs = (t.sum((1, 2)).tolist() for t in (g, moved))
        assert sorted(theirs) == pytest.approx(sorted(sums))
        assert all(abs(a - b) > 1e-4 for a, b in zip(sums, theirs, strict=True))


def test_untrained_control_gives_the_same_values_as_an_untrained_importance_function_ranks_them():
    model = tiny_model(torch.float32)
    vpd, tokens = decomposition_of(model), some_tokens(shape=(3, 6))
    alive = torch.arange(vpd.site_axis.total) != 3
    with sampled(vpd, model, tokens) as sample:
        g = next(sample.batches()).g
        control = untrained_control(vpd, sample.importances, alive, seed=5)
        _, inputs = sample.clean(sample.rows)
        moved = control(sample, sample.rows, inputs)
        z = untrained(vpd, seed=5).pre_sigmoid(inputs).masked_fill(~alive, -torch.inf)
    assert not torch.equal(moved, g)
    for name in vpd.sites:
        values, here, rank = (vpd.site_axis.split_sites(t)[name] for t in (g, moved, z))
        assert_close(here.sort(-1).values, values.sort(-1).values)
        order = rank.argsort(-1, descending=True)
        sorted_here = here.gather(-1, order)
        assert (sorted_here[..., :-1] >= sorted_here[..., 1:]).all()


def test_controls_of_an_importance_function_that_reads_the_residual_stream():
    model = tiny_model(torch.float32)
    vpd, tokens = decomposition_of(model, gamma={**GAMMA, "reads": "residual"}), some_tokens(shape=(3, 6))
    report = evaluate(
        vpd, model, tokens, EvaluationConfig(budgets=(), control_budgets=(), measures=("future_leakage",))
    )
    controls = report.record["controls"]
    for name in ("random", "untrained"):
        assert controls[name]["l0"] == pytest.approx(report.record["l0"])
    assert controls["singular"]["unmasked_ce"] == pytest.approx(report.record["target_ce"], rel=1e-4)
    assert report.record["importance_change"] < 1e-5
