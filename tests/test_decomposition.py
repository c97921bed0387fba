"""What a decomposition says of itself, and Γ on its inputs."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.tiny import GAMMA, decomposition_of, tiny_model
from tl_vpd import Subcomponent, VPDConfig
from tl_vpd.training import new_decomposition


def test_sites_counts_packing_and_shapes_agree(model):
    vpd = decomposition_of(model, C={"*.attn.*": 3, "*.mlp.*": 5})
    assert vpd.counts == {n: 3 if ".attn." in n else 5 for n in vpd.sites}
    assert vpd.site_axis.total == 2 * (4 * 3 + 2 * 5)
    assert all(vpd.V[n].shape == (s.d_in, vpd.counts[n]) for n, s in vpd.sites.items())
    assert all(vpd.U[n].shape == (vpd.counts[n], s.d_out) for n, s in vpd.sites.items())
    assert "12 sites, 44 subcomponents, shared_transformer" in repr(vpd)
    assert "blocks.1.mlp.W_out [12 -> 8] C=5" in repr(vpd)


def test_the_seed_decides_v_u_and_gamma_and_leaves_torchs_state_alone(model):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    one, same, other = (new_decomposition(model, VPDConfig(C=3, gamma=GAMMA, seed=s)).state_dict() for s in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not any(torch.equal(one[k], other[k]) for k in one)


def test_addresses_that_do_not_exist_are_refused_with_what_does(vpd):
    assert vpd.subcomponent("blocks.0.attn.W_Q:5").index == 5
    with pytest.raises(IndexError, match=r"blocks\.0\.attn\.W_Q has 6 subcomponents, 0 to 5"):
        vpd.subcomponent("blocks.0.attn.W_Q:6")
    with pytest.raises(KeyError, match=r"did you mean 'blocks\.0\.attn\.W_Q'"):
        vpd.subcomponent("blocks.0.attn.W_q:1")
    with pytest.raises(ValueError, match="write 'site:index'"):
        vpd.subcomponent("blocks.0.attn.W_Q")


def test_gamma_sees_detached_inputs_and_shared_ones_once(vpd):
    x = torch.randn(1, 3, 8, dtype=torch.float64, requires_grad=True)
    inputs = {n: x if s.d_in == 8 else torch.randn(1, 3, s.d_in, dtype=torch.float64) for n, s in vpd.sites.items()}
    z = vpd.pre_sigmoid(inputs)
    assert_close(z, vpd.gamma({n: t.detach().clone() for n, t in inputs.items()}, None))
    z.sum().backward()
    assert x.grad is None and vpd.gamma.embed.weight.grad is not None
    assert all(v.grad is None for v in vpd.V.values())


def test_mlps_on_activations_read_x_times_v(model):
    vpd = decomposition_of(model, gamma=dict(kind="per_subcomponent_mlps", hidden=3)).double()
    inputs = {n: torch.randn(1, 2, s.d_in, dtype=torch.float64) for n, s in vpd.sites.items()}
    z = vpd.pre_sigmoid(inputs)
    assert_close(z, vpd.gamma({n: x @ vpd.V[n] for n, x in inputs.items()}))
    z.sum().backward()
    assert all(v.grad is None for v in vpd.V.values())


def test_the_record_says_what_it_was_made_of(model):
    record = new_decomposition(model, VPDConfig(C=3, gamma=GAMMA)).record
    assert record["target"]["class"] == "HookedTransformer" and record["training"]["C"] == 3
    assert record["versions"]["torch"] == torch.__version__


def test_weights_with_nans_are_not_decomposed():
    model = tiny_model()
    with torch.no_grad():
        model.blocks[1].mlp.W_in[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.W_in holds values that are not finite"):
        decomposition_of(model)


def test_a_subcomponent_below_0_does_not_exist():
    vpd = decomposition_of(tiny_model())
    with pytest.raises(IndexError, match=r"does not exist: blocks\.0\.attn\.W_K has 6 subcomponents, 0 to 5"):
        vpd.subcomponent(Subcomponent("blocks.0.attn.W_K", -1))
