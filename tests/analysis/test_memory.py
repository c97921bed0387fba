"""Memory of attention's functions: no tensor is larger than what is asked for or its budget, and the numbers are the same."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tiny import draw, tiny_model
from tl_vpd.adapters import adapt
from tl_vpd.analysis.attention import kernel as kernel_module
from tl_vpd.analysis.attention.kernel import measured_kernel
from tl_vpd.analysis.attention.ov import overlaps, random_overlaps


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


def formed(head, d_model, d_head):
    """Factors of W_OV, a covariance, and the read and write matrices written out."""
    W_V, W_O, root = (
        draw(head, d_model, d_head) - 0.5,
        draw(head, d_head, d_model, seed=1) - 0.5,
        draw(d_model, d_model, seed=2),
    )
    M = root.T @ W_V @ W_O
    return W_V, W_O, root @ root.T, (W_V @ W_O, M @ M.mT, M.mT @ M)


def broadcast_cosines(matrices):
    products = (matrices[:, None] * matrices[None]).sum((-2, -1))
    norms = matrices.norm(dim=(-2, -1))
    return products / (norms[:, None] * norms[None])


def test_overlaps_from_factors_are_those_of_the_matrices_themselves():
    W_V, W_O, covariance, matrices = formed(3, 10, 4)
    for result, written_out in zip(overlaps(W_V, W_O, covariance), matrices, strict=True):
        assert_close(result, broadcast_cosines(written_out), rtol=0, atol=1e-12)


def test_random_overlaps_are_those_of_the_matrices_themselves():
    covariance = formed(2, 8, 2)[2]
    root, generator = torch.linalg.cholesky(covariance), torch.Generator().manual_seed(3)
    into, middle, out = (torch.randn(5, 2, d, 2, generator=generator, dtype=torch.float64) for d in (8, 8, 12))
    M = root.T @ into
    W = root.T @ torch.linalg.qr(middle)[0] @ out.mT
    read, write = (torch.stack([broadcast_cosines(m)[0, 1] for m in x]).mean() for x in (M @ M.mT, W.mT @ W))
    assert random_overlaps(covariance, 12, 2, draws=5, seed=3) == pytest.approx((float(read), float(write)), abs=1e-9)


def test_overlaps_form_nothing_of_the_size_of_heads_times_model_squared():
    W_V, W_O, covariance, _ = formed(8, 64, 4)
    with Largest() as largest:
        overlaps(W_V, W_O, covariance)
        random_overlaps(covariance, 64, 4, draws=50, seed=0)
    assert largest.bytes <= 8 * 64 * 64  # the covariance; W_OV of all heads is 8 times as large


def test_measuring_a_kernel_stays_within_its_budget(monkeypatch):
    model, length, d_head, heads = tiny_model(n_ctx=64, d_head=8, rotary_dim=8), 24, 8, 2
    row = 8 * heads * (length + d_head) ** 2  # bytes of one measurement's scores
    with Largest() as largest:
        whole = measured_kernel(adapt(model), 1, length)
    assert largest.bytes > 2 * row
    monkeypatch.setattr(kernel_module, "BYTES", 4 * row)  # four tensors of one measurement's size
    with Largest() as largest:
        again = measured_kernel(adapt(model), 1, length)
    assert largest.bytes <= row and again.values.untyped_storage().nbytes() < row
    assert_close(again.values, whole.values, rtol=0, atol=1e-12)
