"""Fingerprints: by hand, near copies, other weights."""

from __future__ import annotations

import numpy as np
import torch
from torch.testing import assert_close

from tl_vpd.components.fingerprint import TOLERANCE, Fingerprint, compare


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_projections_by_hand():
    W = normal(0, 3, 2)
    draw = np.random.RandomState(0)
    left, right = draw.standard_normal((16, 3)), draw.standard_normal((16, 2))
    exact = W.double().numpy()
    result = Fingerprint.of(W)
    assert_close(result.norm, float(np.sqrt((exact**2).sum())))
    expected = [left[k] @ exact @ right[k] / np.sqrt((exact**2).sum()) for k in range(16)]
    assert_close(np.array(result.projections), np.array(expected))


def test_a_bfloat16_copy_passes_and_a_slightly_other_matrix_does_not():
    W = normal(0, 64, 48)
    stored = {"a": Fingerprint.of(W)}
    assert compare(stored, {"a": W.bfloat16()}) == {} and compare(stored, {"a": W.double()}) == {}
    for other in (normal(1, 64, 48), 1.05 * W, W.roll(1, 0), W + 0.1 * normal(2, 64, 48)):
        assert compare(stored, {"a": other})["a"] > TOLERANCE


def test_mismatch_is_symmetric_and_zero_for_itself():
    one, other = Fingerprint.of(normal(0, 5, 4)), Fingerprint.of(normal(1, 5, 4))
    assert one.mismatch(one) == 0 and one.mismatch(other) == other.mismatch(one) > 0


def test_nan_and_zero_weights_do_not_pass_as_equal():
    W = normal(0, 4, 4)
    broken = W.clone()
    broken[1, 2] = float("nan")
    assert "a" in compare({"a": Fingerprint.of(W)}, {"a": broken})
    assert "a" in compare({"a": Fingerprint.of(W)}, {"a": torch.zeros(4, 4)})
    assert compare({"a": Fingerprint.of(torch.zeros(4, 4))}, {"a": torch.zeros(4, 4)}) == {}
