"""What a decomposition says of itself, and Γ on its inputs."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch.testing import assert_close

from tests.tiny import GAMMA, decomposition_of, tiny_model
from tl_vpd import Decomposition, Subcomponent, VPDConfig
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


def test_a_subcomponent_beyond_the_last_does_not_exist():
    vpd = decomposition_of(tiny_model())
    with pytest.raises(IndexError, match=r"does not exist: blocks\.0\.attn\.W_K has 6 subcomponents, 0 to 5"):
        vpd.subcomponent(Subcomponent("blocks.0.attn.W_K", 6))


def test_making_and_loading_leave_every_generator_alone(model, vpd, tmp_path, monkeypatch):
    """Also the GPUs': ``torch.manual_seed`` would reseed them all."""
    reseeded = []
    for name in ("manual_seed", "manual_seed_all", "_lazy_call"):
        monkeypatch.setattr(torch.cuda, name, lambda *a, name=name, **k: reseeded.append(name))
    torch.default_generator.manual_seed(5)
    expected, before = torch.rand(3), vpd.save(tmp_path / "vpd")
    torch.default_generator.manual_seed(5)
    decomposition_of(model)
    Decomposition.load(before)
    Decomposition.bundled()
    assert torch.equal(torch.rand(3), expected) and reseeded == []
    torch.manual_seed(0)
    assert reseeded  # what is counted is what torch.manual_seed does


def test_what_from_tensors_refuses(model, vpd):
    gamma = {name: p.detach() for name, p in vpd.gamma.named_parameters()}

    def made(V=vpd.V, U=vpd.U, tensors=gamma):
        return Decomposition.from_tensors(model, V, U, vpd.gamma_config, tensors)

    some = dict(list(vpd.V.items())[:3])
    for arguments, error, message in [
        (dict(V={}, U={}, tensors={}), ValueError, "V and U are empty"),
        (dict(U=some), KeyError, "is in V only: give V and U of the same sites"),
        (
            dict(V={**vpd.V, "blocks.0.attn.W_q": vpd.V["blocks.0.attn.W_Q"]}),
            KeyError,
            "did you mean 'blocks.0.attn.W_Q'",
        ),
        (dict(tensors={}), KeyError, r"Γ \(shared_transformer\) needs the tensors"),
        (dict(tensors={**gamma, "extra": torch.zeros(1)}), KeyError, r"does not know \['gamma/extra'\]"),
        (
            dict(U={**vpd.U, "blocks.0.attn.W_Q": torch.zeros(6, 9)}),
            ValueError,
            r"W_Q is \(6, 9\), and \(6, 8\) is needed",
        ),
        (
            dict(U={**vpd.U, "blocks.0.attn.W_Q": torch.full((6, 8), float("nan"))}),
            ValueError,
            "U/blocks.0.attn.W_Q has 48 of 48 entries that are NaN or infinite",
        ),
    ]:
        with pytest.raises(error, match=message):
            made(**arguments)


def test_from_tensors_reads_tensors_on_demand_and_stores_them_in_the_dtype_asked(model, vpd):
    class OnDemand(Mapping):
        def __getitem__(self, name):
            return dict(vpd.gamma.named_parameters())[name].detach()

        def __iter__(self):
            return iter(dict(vpd.gamma.named_parameters()))

        def __len__(self):
            return len(dict(vpd.gamma.named_parameters()))

    made = Decomposition.from_tensors(model, vpd.V, vpd.U, vpd.gamma_config, OnDemand(), dtype=torch.float32)
    assert all(t.dtype == torch.float32 for t in made.parameters())
    assert all(torch.equal(t, vpd.file_tensors()[key].float()) for key, t in made.file_tensors().items())
