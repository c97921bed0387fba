"""Values and gradients of the two squashings, by hand (VPD paper, section on the causal-importance function)."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from tl_vpd.importance import lower_leaky, upper_leaky
from tl_vpd.importance.squash import LOWER_LEAKY

Z = torch.tensor([[-2.0, -0.5, 0.0, 0.25, 1.0, 1.5]], dtype=torch.float64)


def gradient(squash, incoming):
    z = Z.clone().requires_grad_()
    squash(z).backward(torch.full_like(Z, incoming))
    return z.grad.flatten().tolist()


def test_lower_leaky_is_a_hard_sigmoid_forward():
    assert lower_leaky(Z).flatten().tolist() == [0.0, 0.0, 0.0, 0.25, 1.0, 1.0]


def test_lower_leaky_leaks_below_zero_only_where_descent_would_raise_z():
    assert gradient(lower_leaky, 2.0) == [0.0, 0.0, 0.0, 2.0, 2.0, 0.0]
    assert gradient(lower_leaky, -2.0) == [-0.02, -0.02, -0.02, -2.0, -2.0, 0.0]


def test_the_squash_of_training_is_lower_leaky():
    assert_close(LOWER_LEAKY.importances(Z), lower_leaky(Z))
    for incoming in (2.0, -2.0):
        pulled = LOWER_LEAKY.pullback(Z, torch.full_like(Z, incoming)).flatten().tolist()
        assert pulled == gradient(lower_leaky, incoming)


def test_upper_leaky_leaks_above_one():
    assert_close(upper_leaky(Z).flatten().tolist(), [0.0, 0.0, 0.0, 0.25, 1.0, 1.005])
    grad = gradient(upper_leaky, 2.0)
    assert grad[:2] == [0.0, 0.0] and grad[3] == 2.0
    assert_close(grad[5], 0.02)


@given(st.integers(1, 400), st.integers(1, 3), st.integers(0, 100))
def test_the_blockwise_backward_does_not_depend_on_the_number_of_rows(rows, columns, seed):
    g = torch.Generator().manual_seed(seed)
    z = (torch.randn(rows, columns, generator=g) * 2).requires_grad_()
    incoming = torch.randn(rows, columns, generator=g)
    lower_leaky(z).backward(incoming)
    leaked = torch.where(incoming < 0, 0.01 * incoming, torch.zeros(()))
    assert_close(z.grad, torch.where(z > 1, torch.zeros(()), torch.where(z > 0, incoming, leaked)).detach())
