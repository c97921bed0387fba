"""Persistent sources: Adam's ascent against torch.optim, the clamp, saving and restoring (VPD paper, section on training)."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tl_vpd.masking import PersistentSources


def sources(seed: int = 0, shape=(2, 3)) -> PersistentSources:
    return PersistentSources(torch.rand(*shape, 7, generator=torch.Generator().manual_seed(seed)))


def gradients(n: int):
    g = torch.Generator().manual_seed(5)
    return [torch.randn(2, 3, 7, generator=g) for _ in range(n)]


def test_ascent_is_adams_with_a_clamp_after_every_update():
    persistent = sources()
    parameter = torch.nn.Parameter(persistent.values.clone())
    adam = torch.optim.Adam([parameter], lr=0.3, betas=(0.5, 0.99), eps=1e-8, maximize=True)
    for gradient in gradients(4):
        persistent.ascend(gradient, 0.3)
        parameter.grad = gradient.clone()
        adam.step()
        with torch.no_grad():
            parameter.clamp_(0, 1)
        assert_close(persistent.values, parameter.detach(), rtol=0, atol=1e-5)
    assert persistent.updates == 4 and float(persistent.values.min()) == 0 and float(persistent.values.max()) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_some_slots_ascend_as_whole_rows_do(dtype):
    """Some slots are not contiguous and go operation by operation, whole rows in one call."""
    some, whole = (PersistentSources(sources(shape=(2, 3)).values.to(dtype)) for _ in range(2))
    for gradient in (g.to(dtype) for g in gradients(3)):
        some.ascend(gradient[:, :2], 0.1, (slice(0, 2), slice(2)))
        whole.ascend(gradient, 0.1)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    for a, b in ((some.values, whole.values), (some.first, whole.first), (some.second, whole.second)):
        assert_close(a[:, :2], b[:, :2], rtol=tolerance, atol=tolerance)
    assert torch.equal(some.values[:, 2], sources(shape=(2, 3)).values.to(dtype)[:, 2])


def test_a_rate_of_zero_moves_the_moments_only():
    persistent = sources()
    before = persistent.values.clone()
    persistent.ascend(gradients(1)[0], 0.0)
    assert torch.equal(persistent.values, before) and persistent.updates == 1
    assert_close(persistent.first, gradients(1)[0] * 0.5)


def test_a_restored_state_goes_on_as_the_original():
    one, other = sources(0), sources(1)
    first, *rest = gradients(3)
    one.ascend(first, 0.1)
    other.load_state_dict({k: t.clone() for k, t in one.state_dict().items()})
    for gradient in rest:
        one.ascend(gradient, 0.1)
        other.ascend(gradient, 0.1)
    assert torch.equal(one.values, other.values) and one.updates == other.updates == 3


def test_sources_of_another_batch_are_refused():
    with pytest.raises(ValueError, match=r"Saved sources are \(2, 3, 7\), this run's are \(4, 3, 7\)"):
        sources(shape=(4, 3)).load_state_dict(sources().state_dict())
