"""Induction: the data, the two heads' scores, and a model that learns it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import tl_vpd
from tests.toys.easy import INDUCTION
from tl_vpd.toys import train
from tl_vpd.toys.induction import BOS, Repeated, induction_scores, mechanism, previous_token_scores, repeated


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 5), st.integers(0, 3), st.integers(0, 50))
def test_rows_repeat_a_block_of_distinct_tokens(shortest, more, step):
    data = Repeated(d_vocab=12, context=17, shortest=shortest, longest=shortest + more, batch_size=4, seed=2)
    tokens = data.at(step)
    assert torch.equal(tokens, data.at(step)) and tokens.shape == (4, 17) and bool((tokens[:, 0] == BOS).all())
    for row, known in zip(tokens.tolist(), repeated(tokens).tolist(), strict=True):
        body = row[1:]
        period = len(set(body))
        assert shortest <= period <= shortest + more and BOS not in body
        assert body == [body[i % period] for i in range(16)]
        assert known == [False] * (1 + period) + [True] * (16 - period)


def test_scores_of_heads_by_hand():
    tokens = torch.tensor([[0, 5, 7, 5, 7]])
    previous = torch.zeros(1, 1, 5, 5)
    previous[0, 0, 1, 0], previous[0, 0, 2, 1], previous[0, 0, 3, 3] = 1.0, 0.5, 1.0
    assert previous_token_scores(previous, tokens).tolist() == [0.75]
    induction = torch.zeros(1, 2, 5, 5)
    induction[0, 0, 3, 2], induction[0, 0, 4, 3] = (
        1.0,
        0.5,
    )  # after the earlier 5 stands 7, after the earlier 7 stands 5
    induction[0, 1, 3, 1], induction[0, 1, 4, 2] = 1.0, 1.0  # the earlier occurrences themselves
    assert induction_scores(induction, tokens).tolist() == [0.75, 0.0]


def test_a_small_model_learns_it_with_a_previous_token_head_and_an_induction_head():
    model = train(INDUCTION, 0)
    quality = INDUCTION.quality(model)
    assert quality["accuracy"] > 0.8 and quality["induction_score"] > 0.5 and quality["previous_token_score"] > 0.4
    assert quality["from_alike"] < 0.1
    fresh = INDUCTION.quality(INDUCTION.build(0))
    assert fresh["accuracy"] < 0.35 and fresh["induction_score"] < 0.4 and fresh["previous_token_score"] < 0.3
    # The truth, checked on the model: every weight where it is needed alone does nearly all of the work.
    assert quality["needed_alone"] < 0.1 * quality["none"]
    truth = INDUCTION.truth(model)
    assert set(truth.needed) == set(tl_vpd.sites(model)["site"]) and not truth.sites and not truth.latents
    assert set(INDUCTION.build(0).state_dict()) == set(model.state_dict())


def test_where_each_weight_is_needed_by_hand():
    # 7 does not come again, so nobody will look for what follows it.
    needed = mechanism(torch.tensor([[0, 5, 6, 7, 5, 6]]))
    at = {site: where[0].nonzero()[:, 0].tolist() for site, where in needed.items()}
    assert at == {
        "blocks.0.attn.W_Q": [2, 3],
        "blocks.0.attn.W_K": [0, 1, 2, 3],
        "blocks.0.attn.W_V": [1, 2],
        "blocks.0.attn.W_O": [2, 3],
        "blocks.1.attn.W_Q": [1, 2, 3, 4, 5],
        "blocks.1.attn.W_K": [0, 2, 3],
        "blocks.1.attn.W_V": [2, 3],
        "blocks.1.attn.W_O": [4, 5],
    }


def test_the_loss_asks_for_the_next_token_or_for_all_alike():
    logits = torch.randn(1, 5, INDUCTION.d_vocab, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[0, 5, 6, 5, 6]])
    log_q = logits[0].double().log_softmax(-1)
    by_hand = 0.5 * (-log_q[3, 6] - log_q[:3].mean())
    assert_close(INDUCTION.loss(lambda _: logits, tokens), by_hand.float())


def test_models_of_two_seeds_differ_and_of_one_do_not():
    a, b, c = INDUCTION.build(0), INDUCTION.build(0), INDUCTION.build(1)
    assert torch.equal(a.W_Q, b.W_Q) and not torch.equal(a.W_Q, c.W_Q)
    with pytest.raises(AttributeError):
        INDUCTION.d_model = 3
