"""Γ on the residual stream: what it reads, on both classes, and where it is refused."""

from __future__ import annotations

import re

import pytest
import torch
from torch.testing import assert_close
from transformer_lens.hook_points import HookedRootModule

from tests.tiny import GAMMA, decomposition_of, some_tokens, tiny_model
from tl_vpd import Decomposition, GammaConfig, VPDConfig, bundled
from tl_vpd.forward import MaskedModel
from tl_vpd.importance.squash import lower_leaky
from tl_vpd.training import new_decomposition

RESIDUAL = {**GAMMA, "reads": "residual"}
CHUNKED = {**RESIDUAL, "kind": "chunked_transformers", "chunk": 3}
SITES = ("blocks.0.attn.W_[VO]", "blocks.2.*")


def streams(model, tokens):
    """The residual stream that enters each block, by the hook's name."""
    _, cache = model.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_resid_pre"))
    return {name: cache[name] for name in cache}


@pytest.fixture(scope="module")
def model():
    return tiny_model(n_layers=3)


@pytest.mark.parametrize("gamma", [RESIDUAL, CHUNKED], ids=["shared", "chunked"])
def test_importances_are_those_of_gamma_on_the_stream_at_every_decomposed_block(model, gamma, tmp_path):
    vpd, tokens = decomposition_of(model, sites=SITES, gamma=gamma).double(), some_tokens()
    assert vpd.gamma_inputs == ("blocks.0.hook_resid_pre", "blocks.2.hook_resid_pre")
    read = streams(model, tokens)
    if gamma is RESIDUAL:
        assert vpd.gamma.names == list(vpd.gamma_inputs) and vpd.gamma.embed.in_features == 16
    else:  # the first chunk has V, O of block 0 and Q of block 2; the others are in block 2
        assert [part.names for part in vpd.gamma.parts] == [list(vpd.gamma_inputs), *[["blocks.2.hook_resid_pre"]] * 2]
    expected = lower_leaky(vpd.gamma({name: read[name] for name in vpd.gamma_inputs}))
    assert_close(torch.cat(list(vpd.causal_importances(model, tokens).values()), dim=-1), expected)
    again = Decomposition.load(vpd.save(tmp_path / "vpd"), dtype=torch.float64)
    assert_close(torch.cat(list(again.causal_importances(model, tokens).values()), dim=-1), expected)
    with vpd.attach(model):
        _, cache = model.run_with_cache(tokens)
    assert_close(cache["blocks.2.hook_q_ci"], vpd.site_axis.split_sites(expected)["blocks.2.attn.W_Q"])


def test_gamma_sees_what_a_users_hook_makes_of_the_stream(model):
    vpd, tokens = decomposition_of(model, sites=SITES, gamma=RESIDUAL).double(), some_tokens()
    patched = {name: x.clone() for name, x in streams(model, tokens).items()}
    patched["blocks.2.hook_resid_pre"] = -patched["blocks.2.hook_resid_pre"]
    seen = []
    hooks = [("blocks.2.hook_resid_pre", lambda x, hook: -x), ("blocks.2.hook_in_ci", lambda g, hook: seen.append(g))]
    with vpd.attach(model):
        model.run_with_hooks(tokens, fwd_hooks=hooks)
    expected = lower_leaky(vpd.gamma({name: patched[name] for name in vpd.gamma_inputs}))
    assert_close(seen[0], vpd.site_axis.split_sites(expected)["blocks.2.mlp.W_in"])


def test_both_classes_agree():
    config = VPDConfig(C=4, gamma={**GAMMA, "d_ci": 16, "reads": "residual"})
    hooked = bundled.model()
    vpd = new_decomposition(hooked, config)
    tokens = bundled.tokens("validation")[:2, :16]
    a = vpd.causal_importances(hooked, tokens)
    b = vpd.causal_importances(bundled.model(kind="bridge"), tokens)
    for name in a:
        assert_close(a[name], b[name], rtol=0, atol=1e-4)


def test_training_gathers_the_streams_alone(model):
    vpd = decomposition_of(model, sites=SITES, gamma=RESIDUAL).double()
    with MaskedModel(vpd, model) as masked_model:
        _, inputs = masked_model.clean(some_tokens())
        assert set(inputs) == {*vpd.sites, *vpd.gamma_inputs}  # measures need the sites' inputs too
        without = {name: x for name, x in inputs.items() if name in vpd.sites}
        with pytest.raises(KeyError, match=re.escape("The inputs lack blocks.0.hook_resid_pre, which Γ reads")):
            vpd.importances(without)
        assert torch.equal(vpd.importances({n: inputs[n] for n in vpd.gamma_inputs}), vpd.importances(inputs))


class TwoLayers(HookedRootModule):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)
        self.setup()

    def forward(self, x):
        return self.second(self.first(x).relu())


def test_models_and_kinds_without_a_stream_are_refused_by_name():
    with pytest.raises(ValueError, match="needs sites in the blocks of a transformer, and first is not in one"):
        new_decomposition(TwoLayers(), VPDConfig(C=2, gamma=RESIDUAL))
    for kind in ("per_subcomponent_mlps", "per_site_mlps", "global_mlp"):
        with pytest.raises(ValueError, match=f"reads='residual' goes with .*, and kind is '{kind}'"):
            GammaConfig(kind=kind, reads="residual")
