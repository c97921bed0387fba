"""Adversaries by their freedom, against enumeration on a model whose worst masks are known."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tests.evaluation import handmade
from tests.evaluation.handmade import rows
from tests.tiny import decomposition_of, some_tokens, tiny_model
from tl_vpd.evaluation import STANDARD, Adversary, adversaries, attack, sampled
from tl_vpd.evaluation.adversaries import _SourceLoss, explanations, union_of
from tl_vpd.masking import masks_from_sources


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    model = tiny_model(torch.float32)
    return model, decomposition_of(model, C=5)


def test_union_by_hand():
    sets = torch.tensor([[True, True, False], [False, True, False]])
    assert_close(union_of(torch.tensor([0.5, 0.5]), sets), torch.tensor([0.5, 0.75, 0.0]))
    for weights in product((0.0, 1.0), repeat=2):
        chosen = torch.tensor(weights).bool()
        assert_close(union_of(torch.tensor(weights), sets), (sets & chosen[:, None]).any(0).float())


def test_shared_attack_does_what_its_sources_say_and_is_worse_than_any_corner_tried():
    # Of X and −X the adversary keeps one and leaves the other out; then it may still choose among what X has turned on.
    model = handmade.known_model()
    vpd = handmade.with_opposed(model, pairs=1, size=1.0)
    with sampled(vpd, model, rows(8)) as sample:
        result = attack(sample, Adversary(steps=20, starts=3))

        def kl(sources: torch.Tensor) -> float:
            return sample.distances(lambda batch: masks_from_sources(batch.g, sources, sample.site_axis)).mean

        corners = [torch.zeros(1, 1, sample.site_axis.total + 2) for _ in range(4)]
        for sources, corner in zip(corners, product((0.0, 1.0), repeat=2), strict=True):
            sources[..., 16:18] = torch.tensor(corner)
        harm = [kl(sources) for sources in corners]
        again = kl(result.sources)
    assert harm[0] == pytest.approx(harm[3], abs=1e-4) and min(harm[1:3]) > 10 * harm[0]  # together they do nothing
    assert result.kl > max(harm)
    assert result.kl == pytest.approx(again, rel=1e-5)
    pair = result.sources[0, 0, 16:18]
    assert float((pair[0] - pair[1]).abs()) > 0.9
    assert len(result.losses) == 3 and result.kl == max(result.losses)


def test_a_choice_for_every_token_is_the_strongest_and_rows_do_not_mix(tiny):
    model, vpd = tiny
    tokens = some_tokens(shape=(5, 6))
    with sampled(vpd, model, tokens, batch_size=2) as sample:
        by_scope = {s: attack(sample, Adversary(s, steps=80)).kl for s in ("shared", "position", "token")}
        whole = attack(sample, Adversary("token", steps=4))
    assert by_scope["token"] > max(by_scope["shared"], by_scope["position"])
    with sampled(vpd, model, tokens, batch_size=5) as sample:
        # Rows are independent here: how they are cut into batches changes nothing but rounding.
        again = attack(sample, Adversary("token", steps=4))
    assert again.kl == pytest.approx(whole.kl, rel=1e-3)
    assert again.by_row[0].mean == pytest.approx(again.kl, rel=1e-5)
    assert again.sources is None  # for all rows they would not fit in memory


def test_a_rows_starts_are_its_whatever_the_rows_beside_it(tiny):
    model, vpd = tiny
    starts = []
    with sampled(vpd, model, some_tokens(shape=(5, 6))) as sample:
        for rows in ([0, 1, 2, 3, 4], [3, 1]):
            batch = sample.batch(sample.rows.take(rows))
            starts.append(_SourceLoss(sample, "token", None, batch).start(1))
    assert torch.equal(starts[1], starts[0][[3, 1]])
    assert not torch.equal(starts[0][0], starts[0][1])


def test_span_only_adds_what_other_tokens_need(tiny):
    model, vpd = tiny
    with sampled(vpd, model, some_tokens(shape=(4, 6))) as sample:
        sets = explanations(sample, 3)
        assert sets.shape == (3, vpd.site_axis.total)
        rows_of_g = torch.cat([batch.g.flatten(0, 1) for batch in sample.batches()]) > 0
        assert all(any(torch.equal(s, row) for row in rows_of_g) for s in sets)
        nothing = attack(sample, Adversary(explanations=2, steps=5), span=torch.zeros_like(sets))
        ci = sample.distances(
            lambda batch: masks_from_sources(
                batch.g, torch.zeros(1, 1, vpd.site_axis.total + len(vpd.sites)), sample.site_axis
            )
        )
        assert nothing.kl == pytest.approx(ci.mean, rel=1e-5)  # with nothing to add, importances are the masks, Δ is 0
        free, bound = (attack(sample, Adversary(explanations=n, steps=20)) for n in (None, 3))
    assert bound.kl < free.kl
    assert bound.sources.shape == (1, 1, 3)


def test_table_bears_the_budget(tiny):
    model, vpd = tiny
    with sampled(vpd, model, some_tokens(shape=(4, 6))) as sample:
        table = adversaries(sample, budgets=(1, 2), rows=2)
    assert len(table) == 2 * len(STANDARD)
    assert set(table["adversary"]) == {"shared", "shared, momentum", "position", "token", "span"}
    assert set(table["tokens"]) == {12}
    assert (table["steps"] * table["step_size"]).tolist() == [2.0] * len(table)
    assert (table["kl_low"] <= table["kl_high"]).all()


def test_a_fixed_seed_gives_the_same_attack(tiny):
    model, vpd = tiny
    tokens = some_tokens(shape=(3, 6))
    results = []
    for seed in (0, 0, 1):
        with sampled(vpd, model, tokens, seed=seed) as sample:
            results.append(attack(sample, Adversary(steps=2, momentum=0.5)).kl)
    assert results[0] == results[1] != results[2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"starts": 0}, "starts=0: give an integer of at least 1"),
        ({"explanations": 0}, "explanations=0: give an integer of at least 1"),
        ({"scope": "row"}, "choose from .shared."),
    ],
)
def test_impossible_adversaries_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Adversary(**settings)
