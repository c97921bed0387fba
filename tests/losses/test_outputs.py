"""Distances between outputs: values and gradients by hand, in float64 where the outputs are, and 0 without a real position
(VPD paper, "Optimizing for mechanistic faithfulness"; SPD, arXiv 2506.20790, section 2)."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from tl_vpd.evaluation.batch import ce_by_row
from tl_vpd.losses import Reconstruction, Unembedding, kl_divergence, squared_error, unembedded_kl
from tl_vpd.losses import unembedding as module
from tl_vpd.losses.precision import at_least_float32


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_definition(target, output, token_mask=None):
    """KL divergence from logits by autograd."""
    log_p, log_q = target.log_softmax(-1), output.log_softmax(-1)
    each = (log_p.exp() * (log_p - log_q)).sum(-1)
    return each.mean() if token_mask is None else each[token_mask].mean()


def test_the_kl_divergence_of_two_coins():
    p, q = torch.tensor([0.5, 0.5], dtype=torch.float64), torch.tensor([0.9, 0.1], dtype=torch.float64)
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert float(kl_divergence(p.log()[None, None], q.log()[None, None])) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("token_mask", [None, torch.tensor([[True, False, True], [True, True, False]])])
@pytest.mark.parametrize("block", [1 << 17, 10])
def test_kl_divergence_and_its_gradient_are_those_of_the_formula(token_mask, block, monkeypatch):
    monkeypatch.setattr("tl_vpd.losses.kl._BLOCK", block)
    target, logits = normal(2, 3, 5), normal(2, 3, 5, seed=1).requires_grad_()
    expected = by_definition(target, logits, token_mask)
    loss = kl_divergence(target.log_softmax(-1), logits, token_mask)
    assert_close(loss, expected, rtol=1e-13, atol=0)
    gradients = [torch.autograd.grad(3 * x, logits)[0] for x in (loss, expected)]
    assert_close(*gradients, rtol=1e-12, atol=1e-14)


def test_squared_error_by_hand():
    target, output = torch.zeros(1, 2, 2), torch.tensor([[[1.0, 3.0], [2.0, 2.0]]])
    assert float(squared_error(target, output)) == (5 + 4) / 2
    assert float(squared_error(target, output, torch.tensor([[False, True]]))) == 4


def test_cross_entropy_by_hand_counts_pairs_of_real_tokens():
    q = torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [1 / 3] * 3]], dtype=torch.float64)
    tokens = torch.tensor([[0, 1, 2]])
    assert ce_by_row(q.log(), tokens, None).mean == pytest.approx(-(math.log(0.25) + math.log(0.7)) / 2, rel=1e-14)
    left = torch.tensor([[False, True, True]])
    assert ce_by_row(q.log(), tokens, left).mean == pytest.approx(-math.log(0.7), rel=1e-14)


@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 3),
    pos=st.integers(1, 5),
    vocabulary=st.integers(2, 40),
    padded=st.booleans(),
    bias=st.booleans(),
)
def test_kl_divergence_in_blocks_of_logits_is_that_of_whole_logits(rows, pos, vocabulary, padded, bias):
    unembedding = Unembedding(normal(vocabulary, 3), normal(vocabulary, seed=1) if bias else None)
    target, x = normal(rows, pos, 3, seed=2), normal(rows, pos, 3, seed=3).requires_grad_()
    token_mask = None
    if padded:
        token_mask = normal(rows, pos, seed=4) > 0
        token_mask[0, 0] = True
    whole = [F.linear(t, unembedding.weight, unembedding.bias) for t in (target, x)]
    expected = by_definition(*whole, token_mask)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "LOGITS_AT_ONCE", 4 * 22)
        loss = unembedded_kl(target, x, unembedding, token_mask)
        gradients = [torch.autograd.grad(3 * y, x)[0] for y in (loss, expected)]
        with torch.no_grad():
            assert_close(unembedded_kl(target, x, unembedding, token_mask), loss.detach())
    assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    assert_close(*gradients, rtol=1e-12, atol=1e-14)


UNEMBEDDING = Unembedding(normal(7, 5, seed=9), None)
DISTANCES = {
    "kl": lambda target, output, real: kl_divergence(target.log_softmax(-1), output, real),
    "kl from the unembedding's inputs": lambda target, output, real: unembedded_kl(target, output, UNEMBEDDING, real),
    "squared error": squared_error,
    "reconstruction, kl": lambda target, output, real: Reconstruction(target, "kl", real)(output),
    "reconstruction, mse": lambda target, output, real: Reconstruction(target, "mse", real)(output),
}


@pytest.mark.parametrize("name", DISTANCES)
def test_without_a_real_position_the_mean_is_zero_and_so_is_its_gradient(name):
    output = normal(2, 3, 5, seed=1).requires_grad_()
    loss = DISTANCES[name](normal(2, 3, 5), output, torch.zeros(2, 3, dtype=torch.bool))
    loss.backward()
    assert float(loss.detach()) == 0 and bool((output.grad == 0).all())


@pytest.mark.parametrize("name", DISTANCES)
def test_losses_are_computed_in_float32_at_least_and_stay_in_float64(name):
    real = torch.ones(2, 3, dtype=torch.bool)
    loss = DISTANCES[name](normal(2, 3, 5), normal(2, 3, 5, seed=1), real)
    assert loss.dtype == torch.float64
    for dtype in (torch.float32, torch.bfloat16):
        if dtype == torch.bfloat16 and "unembedding" in name:
            continue
        lower = DISTANCES[name](*(normal(2, 3, 5, seed=s).to(dtype) for s in (0, 1)), real)
        assert lower.dtype == (torch.float64 if "unembedding" in name else torch.float32)
        assert float(lower) == pytest.approx(float(loss), rel=1e-6 if dtype == torch.float32 else 0.05)


def test_promotion():
    kinds = {torch.bfloat16: torch.float32, torch.float32: torch.float32, torch.float64: torch.float64}
    assert {k: at_least_float32(torch.ones(1, dtype=k)).dtype for k in kinds} == kinds


def test_a_slice_of_the_batch_is_compared_with_its_rows_of_the_target():
    target, output, real = normal(3, 4, 5), normal(3, 4, 5, seed=1), normal(3, 4, seed=2) > -0.5
    part = Reconstruction(target, "kl", real).rows(slice(1, 3))
    assert_close(part(output[1:]), by_definition(target[1:], output[1:], real[1:]))
