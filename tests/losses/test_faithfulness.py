"""Faithfulness: both kinds by their formula, and site by site (VPD paper, "Enforcing parameter faithfulness")."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tl_vpd.losses import faithfulness, faithfulness_terms


@pytest.mark.parametrize("relative", [False, True])
def test_both_kinds_are_their_formula(vpd, relative):
    random = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(s.d_in, s.d_out, generator=random, dtype=torch.float64) for n, s in vpd.sites.items()}
    errors = torch.stack([(W - vpd.V[n] @ vpd.U[n]).square().sum() for n, W in weights.items()])
    norms = torch.stack([W.square().sum() for W in weights.values()])
    expected = (errors / norms).mean() if relative else errors.sum() / sum(W.numel() for W in weights.values())
    assert_close(faithfulness(vpd.components, weights, relative=relative), expected)
    assert_close(sum(faithfulness_terms(vpd.components, weights, relative=relative)), expected)


def test_it_is_zero_where_subcomponents_sum_to_the_weights(vpd):
    weights = {name: (vpd.V[name] @ vpd.U[name]).detach() for name in vpd.sites}
    assert float(faithfulness(vpd.components, weights).detach()) == 0


@pytest.mark.parametrize("relative", [False, True])
def test_weights_in_half_precision_are_compared_in_that_of_v_and_u(vpd, relative):
    weights = {name: torch.full((s.d_in, s.d_out), 50.0, dtype=torch.float16) for name, s in vpd.sites.items()}
    exact = faithfulness(vpd.components, {name: W.double() for name, W in weights.items()}, relative=relative)
    assert_close(faithfulness(vpd.components, weights, relative=relative), exact)
