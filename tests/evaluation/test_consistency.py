"""Similarity of decompositions by hand, and subcomponents that cancel."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.evaluation import handmade
from tests.tiny import decomposition_of, tiny_model
from tl_vpd.evaluation import cancelling_pairs, consistency
from tl_vpd.evaluation.consistency import max_cosines, split_share


def test_max_cosines_by_hand():
    V, U = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    other_V, other_U = torch.tensor([[-1.0, 1.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    result = max_cosines(V, U, other_V, other_U)
    half = 0.5**0.5
    assert_close(result["V"], torch.tensor([1.0, half]))  # a sign alone is no difference
    assert_close(result["U"], torch.tensor([1.0, half]))
    # −e₁ ⊗ e₁ points against e₁ ⊗ e₁; the other is e₁+e₂ both ways: cosine ½ with either.
    assert_close(result["rank_one"], torch.tensor([0.5, 0.5]))


def test_split_share_by_hand():
    U = torch.eye(3)
    halves = torch.tensor(
        [[1.0, 0.4, 0.0], [-1.0, 0.4, 0.0], [0.0, 0.0, 2.0]]
    )  # two for the first, none for the second
    assert split_share(U, halves) == pytest.approx(1 / 3)
    assert split_share(halves, U) == 0.0


def test_a_decomposition_is_consistent_with_itself_in_any_order_sign_and_length():
    model = tiny_model(torch.float32)
    one, two = decomposition_of(model, C=6), decomposition_of(model, C=6, seed=1)
    order = torch.tensor([3, 1, 0, 5, 2, 4])
    same = decomposition_of(model, C=6, seed=2)
    with torch.no_grad():
        for name in one.sites:
            same.V[name].copy_(-2 * one.V[name][:, order])
            same.U[name].copy_(-0.1 * one.U[name][order])
    table = consistency(one, same)
    assert list(table.loc["mean", ["V", "U", "rank_one"]]) == pytest.approx([1.0, 1.0, 1.0])
    chance = consistency(one, two).loc["mean"]
    for measure in ("V", "U", "rank_one"):
        # Two random decompositions are as alike as chance has it.
        assert chance[measure] == pytest.approx(chance[f"{measure}_random"], abs=0.06)
        assert chance[measure] < 0.9
    assert table.loc["mean", "C"] == 6 * len(one.sites)


def test_only_the_living_are_compared():
    model = tiny_model(torch.float32)
    one, two = decomposition_of(model, C=6), decomposition_of(model, C=6, seed=1)
    with torch.no_grad():
        for name in one.sites:
            two.V[name][:, 0].copy_(one.V[name][:, 2])
            two.U[name][0].copy_(one.U[name][2])
    first, third = ({n: torch.arange(6) == k for n in one.sites} for k in (0, 2))
    assert consistency(one, two, alive=(third, first)).loc["mean", "rank_one"] == pytest.approx(1.0)
    dead = first | {"blocks.0.attn.W_Q": torch.zeros(6, dtype=torch.bool)}
    table = consistency(one, two, alive=(third, dead))
    assert table["V"].isna().sum() == 1 and table.loc["blocks.0.attn.W_Q", "C_other"] == 0
    assert table.loc["mean", "rank_one"] == pytest.approx(1.0)


def test_other_sites_are_refused():
    model = tiny_model(torch.float32)
    with pytest.raises(ValueError, match="not decompositions of the same weights"):
        consistency(decomposition_of(model), decomposition_of(model, sites=("blocks.0.*",)))


def test_pairs_are_different_subcomponents_each_once_whatever_the_bound():
    model = handmade.known_model()
    right = handmade.right(model)
    result = cancelling_pairs(right, below=1.0, smallest=0.0, k=1000)
    n = right.counts[handmade.IN]
    assert len(result) == 2 * (n * (n - 1) // 2) == len(set(zip(result["one"], result["other"], strict=True)))
    assert (result["one"] != result["other"]).all()


def test_cancelling_pairs_are_named_and_others_are_not():
    model = handmade.known_model()
    assert len(cancelling_pairs(handmade.right(model))) == 0
    result = cancelling_pairs(handmade.with_opposed(model, pairs=1, size=2.0))
    assert len(result) == 1
    row = result.iloc[0]
    assert (row["one"], row["other"]) == (f"{handmade.IN}:16", f"{handmade.IN}:17")
    assert row["cosine"] == pytest.approx(-1.0) and row["norm"] == pytest.approx(row["norm_other"])
    assert row["norm_sum"] == pytest.approx(0.0, abs=1e-2)
    # Of many pairs no more than k are listed, and tiny ones are noise.
    many = handmade.with_opposed(model, pairs=20, size=2.0)
    assert len(cancelling_pairs(many, k=7)) == 7
    assert len(cancelling_pairs(handmade.with_opposed(model, pairs=1, size=1e-3))) == 0
