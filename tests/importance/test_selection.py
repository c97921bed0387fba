"""Fewer subcomponents: V, U and every kind of Γ, each giving what the selected ones gave."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch.testing import assert_close

from tests.tiny import decomposition_of, matrix_of, some_tokens, tiny_model
from tl_vpd.forward import MaskedModel
from tl_vpd.importance import GammaConfig
from tl_vpd.importance.selection import selected

KINDS = get_args(GammaConfig.model_fields["kind"].annotation)
C = {"blocks.0.attn.W_Q": 4, "blocks.0.mlp.W_in": 5, "blocks.1.attn.W_O": 3, "blocks.1.mlp.W_out": 6}
INDICES = {
    "blocks.0.attn.W_Q": torch.tensor([1]),
    "blocks.0.mlp.W_in": torch.tensor([4, 0, 2]),
    "blocks.1.attn.W_O": torch.tensor([0, 1, 2]),
    "blocks.1.mlp.W_out": torch.tensor([5, 3]),
}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def of_kind(model, kind):
    vpd = decomposition_of(
        model, C, sites=list(C), gamma=dict(kind=kind, d_ci=8, n_blocks=1, n_heads=2, chunk=3)
    ).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in vpd.gamma.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return vpd


@pytest.mark.parametrize("kind", KINDS)
def test_selected_ones_read_write_and_matter_as_before(model, kind):
    vpd = of_kind(model, kind)
    before = {key: t.clone() for key, t in vpd.file_tensors().items()}
    fewer = selected(vpd, INDICES)
    assert type(fewer) is type(vpd) and fewer.counts == {name: len(i) for name, i in INDICES.items()}
    with MaskedModel(vpd, model) as masked_model:
        _, inputs = masked_model.clean(some_tokens())
    z, z_fewer = (d.site_axis.split_sites(d.pre_sigmoid(inputs)) for d in (vpd, fewer))
    for name, index in INDICES.items():
        assert torch.equal(fewer.V[name], vpd.V[name][:, index]) and torch.equal(fewer.U[name], vpd.U[name][index])
        assert_close(z_fewer[name], z[name][..., index], rtol=1e-12, atol=1e-12)
        W = matrix_of(model, name)
        dropped = [c for c in range(C[name]) if c not in index.tolist()]
        extra = vpd.V[name][:, dropped] @ vpd.U[name][dropped]
        assert_close(fewer.components.delta(name, W), vpd.components.delta(name, W) + extra)
    with torch.no_grad():
        for p in fewer.parameters():
            p.zero_()
    assert all(torch.equal(t, before[key]) for key, t in vpd.file_tensors().items())


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_of_gamma_that_grows_with_c_is_named(model, kind):
    small, large = (
        of_kind(model, kind),
        decomposition_of(
            model,
            {name: n + 1 for name, n in C.items()},
            sites=list(C),
            gamma=dict(kind=kind, d_ci=8, n_blocks=1, n_heads=2, chunk=3),
        ),
    )
    grew = {n for n, p in small.gamma.named_parameters() if p.shape != large.gamma.get_parameter(n).shape}
    assert grew == small.gamma.rows_of_subcomponents().keys()


def test_a_site_without_subcomponents_is_refused(model):
    with pytest.raises(ValueError, match=r"C of blocks\.0\.attn\.W_Q is 0; a site needs at least one"):
        selected(of_kind(model, KINDS[0]), {**INDICES, "blocks.0.attn.W_Q": torch.tensor([], dtype=torch.long)})
