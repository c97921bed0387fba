"""The MLP kinds of Γ, and how a config becomes a network."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from torch.testing import assert_close

from tl_vpd.importance import GammaConfig, build, mlps
from tl_vpd.importance.global_mlp import GlobalMLP
from tl_vpd.importance.mlps import PerSiteMLPs, PerSubcomponentMLPs
from tl_vpd.site import Site

D_IN, COUNTS = {"a": 3, "b": 2}, {"a": 2, "b": 3}
SITES = [Site(name, d, 4) for name, d in D_IN.items()]


def gelu(x):
    return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))


def test_a_subcomponents_mlp_reads_its_own_activation_alone():
    torch.manual_seed(0)
    gamma = PerSubcomponentMLPs(COUNTS, hidden=4).double().requires_grad_(False)
    with torch.no_grad():
        gamma.b_in.normal_()
        gamma.b_out.normal_()
    acts = {n: torch.randn(1, 2, c, dtype=torch.float64) for n, c in COUNTS.items()}
    z = gamma(acts)
    concatenated = torch.cat([acts["a"], acts["b"]], dim=-1)
    for t in range(2):
        for c in range(5):
            a = float(concatenated[0, t, c])
            hidden = [gelu(a * float(gamma.w_in[c, h]) + float(gamma.b_in[c, h])) for h in range(4)]
            expected = sum(h * float(w) for h, w in zip(hidden, gamma.w_out[c], strict=True)) + float(gamma.b_out[c])
            assert_close(float(z[0, t, c]), expected)


def directly(name, function, *tensors):
    """A way of carrying out that is none."""
    return function(*tensors)


@pytest.mark.parametrize("how", [1, 10**6, directly])
def test_the_gradients_of_small_mlps_are_those_of_the_equation(how, monkeypatch):
    if how is not directly:
        monkeypatch.setattr(mlps, "_BLOCK", how)
    torch.manual_seed(0)
    gamma = PerSubcomponentMLPs(COUNTS, hidden=4).double()
    with torch.no_grad():
        gamma.b_in.normal_()
    acts = {n: torch.randn(2, 3, c, dtype=torch.float64, requires_grad=True) for n, c in COUNTS.items()}
    weight = torch.randn(2, 3, 5, dtype=torch.float64)
    wanted = [*acts.values(), *gamma.parameters()]
    with gamma.computed_by(how) if how is directly else nullcontext():
        z = gamma(acts)
    got = torch.autograd.grad((z * weight).sum(), wanted)  # outside, as a step's backward is
    a = torch.cat(list(acts.values()), dim=-1)[..., None]
    h = torch.nn.functional.gelu(a * gamma.w_in + gamma.b_in)
    plain = (h * gamma.w_out).sum(-1) + gamma.b_out
    assert_close(z, plain)
    for gradient, expected in zip(got, torch.autograd.grad((plain * weight).sum(), wanted), strict=True):
        assert_close(gradient, expected)


@torch.no_grad()
def test_importances_can_start_as_rising_functions_of_inner_activations():
    torch.manual_seed(0)
    config = {"kind": "per_subcomponent_mlps", "hidden": 8}
    a = torch.linspace(0, 3, 50)[:, None]
    acts = {n: a.expand(-1, c) for n, c in COUNTS.items()}
    below = {n: -values for n, values in acts.items()}
    rising = build(GammaConfig(**config, rising=True), SITES, COUNTS)
    assert bool((rising(acts).diff(dim=0) > 0).all())
    assert float(rising(below).max()) <= 0 < float(rising(acts)[-1].min())
    either = build(GammaConfig(**config), SITES, COUNTS)
    assert not bool((either(acts).diff(dim=0) > 0).all())
    with pytest.raises(ValueError, match="rising=True goes with kind='per_subcomponent_mlps'"):
        GammaConfig(rising=True)


def test_a_sites_mlp_reads_its_normalised_input():
    torch.manual_seed(0)
    gamma = PerSiteMLPs(D_IN, COUNTS, hidden=4).double().requires_grad_(False)
    x = {n: torch.randn(1, 2, d, dtype=torch.float64) for n, d in D_IN.items()}
    z = gamma(x)
    first, _, last = gamma.mlps[1]
    b = x["b"][0, 1]
    b = b / math.sqrt(float(b.square().mean()) + 2**-23)
    hidden = torch.tensor([gelu(float(h)) for h in first.weight @ b + first.bias], dtype=torch.float64)
    assert_close(z[0, 1, 2:], last.weight @ hidden + last.bias)
    scaled = gamma({n: 3 * t for n, t in x.items()})
    assert_close(scaled, z, rtol=0, atol=1e-5)


def test_the_global_mlp_reads_all_normalised_inputs_of_its_position():
    torch.manual_seed(0)
    gamma = GlobalMLP(D_IN, COUNTS, hidden=4).double().requires_grad_(False)
    x = {n: torch.randn(1, 2, d, dtype=torch.float64) for n, d in D_IN.items()}
    z = gamma(x)
    normed = torch.cat([v[0, 1] / math.sqrt(float(v[0, 1].square().mean()) + 2**-23) for v in x.values()])
    hidden = [gelu(float(h)) for h in gamma.embed.weight @ normed + gamma.embed.bias]
    assert_close(z[0, 1], gamma.unembed.weight @ torch.tensor(hidden, dtype=torch.float64) + gamma.unembed.bias)
    moved = gamma({**x, "b": torch.cat([x["b"][:, :1], 2 - x["b"][:, 1:]], dim=1)})
    assert torch.equal(moved[:, 0], z[:, 0]) and not bool((moved[:, 1] == z[:, 1]).any())
    config = GammaConfig(kind="global_mlp")
    assert config.hidden == 512 and not config.reads_the_future and GammaConfig().hidden == 16
    assert GammaConfig(kind="global_mlp", hidden=16).hidden == 16


@pytest.mark.parametrize(
    "kind", ["shared_transformer", "chunked_transformers", "per_subcomponent_mlps", "per_site_mlps", "global_mlp"]
)
def test_every_kind_puts_out_one_value_a_subcomponent(kind):
    gamma = build(GammaConfig(kind=kind, d_ci=8, n_heads=2, n_blocks=1, chunk=1), SITES, COUNTS)
    widths = COUNTS if gamma.needs == "acts" else D_IN
    torch.manual_seed(0)
    x = {n: torch.randn(2, 3, d) for n, d in widths.items()}
    z = gamma(x)
    assert z.shape == (2, 3, 5)
    moved = gamma({**x, "b": x["b"].roll(1, -1)})
    assert not torch.equal(moved[..., 2:], z[..., 2:])


def test_the_width_is_twice_the_models_in_whole_even_heads():
    assert GammaConfig(n_heads=4).resolved(96).d_ci == 192
    assert GammaConfig(n_heads=4).resolved(10).d_ci == 16  # 20 is no multiple of eight
    assert GammaConfig(n_heads=4).resolved(1).d_ci == 8
    assert GammaConfig(d_ci=12).resolved(96).d_ci == 12


def test_an_unresolved_width_and_unknown_fields_are_refused():
    with pytest.raises(ValueError, match="d_ci is None: call resolved"):
        build(GammaConfig(), SITES, COUNTS)
    with pytest.raises(ValueError, match="n_block"):
        GammaConfig(n_block=1)
    with pytest.raises(ValueError, match="greater than 0"):
        GammaConfig(hidden=0)
