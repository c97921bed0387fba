"""Causal importances of prompts as a result: mapping, tables, masks."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.tiny import decomposition_of, some_tokens, tiny_model
from tl_vpd import EvaluationConfig, bundled, evaluate
from tl_vpd.analysis import harvest
from tl_vpd.forward import MaskedModel
from tl_vpd.hooks import CausalImportances
from tl_vpd.importance import lower_leaky
from tl_vpd.site import ConcatenatedAxis


@pytest.fixture
def ci() -> CausalImportances:
    """One row of three tokens, the first of them padding; two sites with two and one subcomponents."""
    concatenated = torch.tensor([[[0.0, 0.0, 0.0], [0.5, 0.0, 1.0], [0.2, 0.0, 0.0]]])
    token_mask = torch.tensor([[False, True, True]])
    return CausalImportances(concatenated, ConcatenatedAxis({"a": 2, "b": 1}), torch.tensor([[7, 8, 9]]), token_mask)


def test_it_is_a_mapping_by_site(ci):
    assert list(ci) == ["a", "b"] and len(ci) == 2
    assert ci["a"].shape == (1, 3, 2) and ci["b"].flatten().tolist() == [0.0, 1.0, 0.0]
    assert ci.l0.tolist() == [[0, 2, 1]]


def test_tables_by_hand(ci):
    table = ci.to_pandas()
    assert table.values.tolist()[:2] == [[0, 1, 8, "a:0", 0.5], [0, 1, 8, "b:0", 1.0]]
    assert list(table.columns) == ["batch", "pos", "token", "subcomponent", "ci"] and len(table) == 3
    assert ci.to_pandas(above=0.5)["subcomponent"].tolist() == ["b:0"]
    top = ci.top(2)
    assert top["subcomponent"].tolist() == ["b:0", "a:0"]
    assert_close(top["mean_ci"].tolist(), [0.5, 0.35])
    assert top["density"].tolist() == [0.5, 1.0] and len(ci.top(99)) == 3


def test_masks_follow_the_mode_and_seed(ci):
    assert torch.equal(ci.masks("rounded", threshold=0.3)["a"].mask[0, :, 0], torch.tensor([0.0, 1.0, 0.0]))
    one, same, other = (ci.masks("stochastic", seed=s)["a"].mask for s in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    with pytest.raises(ValueError, match="is not a mask mode"):
        ci.masks("round")


@pytest.mark.parametrize(
    "kind", ["shared_transformer", "chunked_transformers", "per_subcomponent_mlps", "per_site_mlps", "global_mlp"]
)
def test_they_are_gamma_of_the_clean_inputs_squashed(model, tokens, kind):
    vpd = decomposition_of(model, gamma=dict(kind=kind, d_ci=8, n_blocks=1, n_heads=2, hidden=4, chunk=5)).double()
    with MaskedModel(vpd, model) as masked_model:
        _, inputs = masked_model.clean(tokens)
    if kind == "per_subcomponent_mlps":
        inputs = {n: x @ vpd.V[n] for n, x in inputs.items()}
    expected = lower_leaky(vpd.gamma(inputs, None)).detach()
    ci = vpd.causal_importances(model, tokens)
    assert_close(ci.concatenated, expected, rtol=1e-10, atol=1e-12)
    assert ci.token_mask is None and torch.equal(ci.tokens, tokens) and not ci.concatenated.requires_grad
    assert_close(vpd.causal_importances(model, tokens[0]).concatenated[0], ci.concatenated[0], rtol=1e-10, atol=1e-12)


def test_users_hooks_do_not_change_them(model, vpd, tokens):
    expected = vpd.causal_importances(model, tokens).concatenated
    model.add_hook("blocks.0.hook_resid_post", lambda x, hook: x * 0)
    assert torch.equal(vpd.causal_importances(model, tokens).concatenated, expected)


def test_tokens_that_do_not_fit_are_refused(model, vpd):
    with pytest.raises(ValueError, match="outside the vocabulary"):
        vpd.causal_importances(model, torch.tensor([[11]]))
    with pytest.raises(ValueError, match="longer than the model's context of 10"):
        vpd.causal_importances(model, torch.zeros(1, 11, dtype=torch.long))
    with pytest.raises(TypeError, match="give a string, a list of strings, or tokens"):
        vpd.causal_importances(model, 3)


@pytest.mark.parametrize("mode", ["zero", "unmasked", "rounded"])
def test_hook_ci_shows_importances_of_the_clean_model_in_every_mode(model, vpd, tokens, mode):
    expected = vpd.causal_importances(model, tokens)
    with vpd.attach(model) as attached, attached.masked(mode), torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    for name, site in vpd.sites.items():
        torch.testing.assert_close(cache[site.hook_name("ci")], expected[name])


def test_importances_of_a_low_precision_model_are_computed_in_float32():
    model = tiny_model(torch.bfloat16)
    vpd = decomposition_of(model)
    tokens = some_tokens()
    with vpd.attach(model), torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    expected = vpd.causal_importances(model, tokens)
    for name, site in vpd.sites.items():
        assert cache[site.hook_name("ci")].dtype == torch.float32
        torch.testing.assert_close(cache[site.hook_name("ci")], expected[name])


def test_a_text_longer_than_the_context_is_refused_and_not_cut():
    model, vpd = bundled.model(), bundled.decomposition()
    with pytest.raises(
        ValueError, match="Sequences of 601 tokens are longer than the model's context of 128; cut them"
    ):
        vpd.causal_importances(model, "import os\n" * 200)


def test_inputs_elsewhere_are_served_there(model, vpd, tokens):
    with MaskedModel(vpd, model) as masked_model:
        _, inputs = masked_model.clean(tokens)
    z = vpd.pre_sigmoid({name: x.to("meta") for name, x in inputs.items()})
    assert z.device.type == "meta" and z.shape == vpd.pre_sigmoid(inputs).shape
    assert vpd.device.type == "cpu" and all(p.device.type == "cpu" for p in vpd.parameters())


@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="a decomposition on the CPU beside a model on a GPU needs a GPU; meta tensors stand in above",
)
def test_a_decomposition_on_the_cpu_serves_a_model_on_a_gpu():
    model, vpd = tiny_model(torch.float32), decomposition_of(tiny_model(torch.float32))
    expected = evaluate(vpd, model, some_tokens(), EvaluationConfig(budgets=(2,), measures=())).record
    ci, harvested = vpd.causal_importances(model, some_tokens()), harvest(vpd, model, some_tokens()).to_pandas()
    model.to("cuda")
    assert_close(vpd.causal_importances(model, some_tokens()).concatenated.cpu(), ci.concatenated, atol=1e-4, rtol=1e-3)
    assert len(harvest(vpd, model, some_tokens()).to_pandas()) == len(harvested)
    result = evaluate(vpd, model, some_tokens(), EvaluationConfig(budgets=(2,), measures=())).record
    assert result["l0"] == pytest.approx(expected["l0"], abs=0.1) and vpd.device.type == "cpu"
