"""Where the sites of a HookedTransformer are, and what is refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests.tiny import ARCHITECTURES, decomposition_of, matrix_of, options_of, some_tokens, tiny_model
from tl_vpd.adapters import Unsupported, adapt, sites
from tl_vpd.adapters.versions import HookedTransformer


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_tapped_output_is_input_times_weight_plus_bias(name):
    model = tiny_model(**ARCHITECTURES[name])
    adapter = adapt(model)
    recorded: dict[str, dict[str, torch.Tensor]] = {site: {} for site in adapter.sites}
    handles = []
    for site, values in recorded.items():
        handles += adapter.tap(
            site, lambda x, values=values: values.update(x=x), lambda y, values=values: values.update(y=y)
        )
    model(some_tokens())
    for handle in handles:
        handle.remove()
    for site, values in recorded.items():
        bias = adapter.bias(site)
        layout = adapter.layout(site)
        x = layout.aligned(values["x"], has_heads=layout.x_has_heads)
        expected = x @ matrix_of(model, site) + (0 if bias is None else bias)
        assert_close(
            layout.aligned(values["y"], has_heads=layout.y_has_heads), expected, rtol=1e-10, atol=1e-10, msg=site
        )
        assert torch.equal(adapter.weight(site), matrix_of(model, site))


def test_sites_come_in_the_order_of_the_forward_pass_with_their_head_layout():
    sites = adapt(tiny_model(n_heads=4, n_key_value_heads=2, gated_mlp=True)).sites
    assert [s.rsplit(".", 1)[1] for s in sites][:7] == ["W_Q", "W_K", "W_V", "W_O", "W_gate", "W_in", "W_out"]
    shapes = {s.short: (s.d_in, s.d_out, s.n_heads, s.d_head) for s in list(sites.values())[:7]}
    assert shapes == {
        "q": (8, 16, 4, 4),
        "k": (8, 8, 2, 4),
        "v": (8, 8, 2, 4),
        "o": (16, 8, 4, 4),
        "gate": (8, 12, None, None),
        "in": (8, 12, None, None),
        "out": (12, 8, None, None),
    }


def test_an_attention_only_model_has_no_mlp_sites():
    assert not [s for s in adapt(tiny_model(attn_only=True)).sites if ".mlp." in s]


def test_experts_are_refused_site_by_site_and_named_when_asked_for():
    model = tiny_model()
    vpd = decomposition_of(model)
    model.cfg.num_experts = 4
    table = sites(model).set_index("site")
    assert table.refused["blocks.0.mlp"] == "a mixture of experts" and table.refused["blocks.0.attn.W_O"] == ""
    with pytest.raises(ValueError, match=r"no blocks\.0\.mlp\.W_in that can be decomposed: a mixture of experts"):
        vpd.attach(model)


def test_a_class_nobody_knows_is_named():
    with pytest.raises(TypeError, match="A Linear cannot be decomposed"):
        adapt(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(2, 3), r"float32 of shape \(2, 3\); integers"),
        (torch.zeros(2, 3, dtype=torch.bool), "integers"),
        (torch.zeros(1, 2, 3, dtype=torch.long), r"shape \(1, 2, 3\)"),
        (torch.zeros(0, 3, dtype=torch.long), "There are no tokens"),
        (torch.zeros(2, 0, dtype=torch.long), "There are no tokens"),
        (torch.zeros(1, 11, dtype=torch.long), "longer than the model's context of 10"),
        (torch.tensor([[3, -1]]), "Tokens run from -1 to 3, outside the vocabulary 0..10"),
        (torch.tensor([[3, 11]]), "Tokens run from 3 to 11"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(tokens, message):
    with pytest.raises(ValueError, match=message):
        adapt(tiny_model()).tokens(tokens)


def test_prompts_of_another_type_are_refused_and_one_row_becomes_a_batch():
    adapter = adapt(tiny_model())
    assert adapter.tokens(torch.tensor([1, 2])).tolist() == [[1, 2]]
    assert adapter.tokens([1, 2]).tolist() == [[1, 2]]
    for prompts in (3, None):
        with pytest.raises(TypeError, match=r"give a string, a list of strings, or tokens"):
            adapter.tokens(prompts)
    with pytest.raises(ValueError, match="the list is empty"):
        adapter.tokens([])


def test_taps_come_off():
    model = tiny_model()
    adapter = adapt(model)
    handles = [h for site in adapter.sites for h in adapter.tap(site, lambda x: None, lambda y: y + 1)]
    changed = model(some_tokens())
    for handle in handles:
        handle.remove()
    assert not torch.equal(model(some_tokens()), changed)
    assert torch.equal(model(some_tokens()), tiny_model()(some_tokens()))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_block_that_is_used_twice_is_refused_by_name(tokens):
    model = tiny_model()
    model.blocks[1].mlp = model.blocks[0].mlp
    adapter = adapt(model)
    assert "blocks.1.attn.W_Q" in adapter.sites and not any(".mlp." in name for name in adapter.sites)
    assert (
        adapter.refused["blocks.1.mlp.W_in"] == "one module with blocks.0.mlp.W_in: give each its copy (copy.deepcopy)"
    )
    with pytest.raises(
        ValueError, match=r"no blocks.0.mlp.W_in that can be decomposed: one module with blocks.1.mlp.W_in"
    ):
        decomposition_of(tiny_model()).attach(model, check_weights=False)
    vpd = decomposition_of(model).double()
    clean = model(tokens)
    with vpd.attach(model) as attached, attached.masked("zero"):
        assert not torch.equal(model(tokens), clean)
    model.blocks[1] = model.blocks[0]
    with pytest.raises(Unsupported, match=r"blocks.0.attn.W_Q: one module with blocks.1.attn.W_Q"):
        adapt(model)


class PassesOn(HookedTransformer):
    """A subclass whose ``forward`` names nothing."""

    def forward(self, *arguments, **keywords):
        return super().forward(*arguments, **keywords)


class PassesSome(HookedTransformer):
    """A subclass whose ``forward`` names its first argument, and one of its own."""

    def forward(self, tokens, *arguments, unused=None, **keywords):
        return super().forward(tokens, *arguments, **keywords)


@pytest.mark.parametrize("kind", [PassesOn, PassesSome])
def test_subclasses_that_pass_arguments_on(kind, vpd, model, tokens):
    other = kind(model.cfg).double()
    other.load_state_dict(model.state_dict())
    assert (
        adapt(other).by_name((tokens, "loss", True), {}).items()
        >= {"return_type": "loss", "loss_per_token": True}.items()
    )
    for mode in ("rounded", "ci", "stochastic", "adversarial"):
        options = options_of(mode, seed=1, steps=2)
        results = []
        for m in (model, other):
            with vpd.attach(m) as attached, attached.masked(mode, **options):
                results.append(m(tokens, "logits"))
        assert torch.equal(*results)
    with vpd.attach(other) as attached:
        expected = vpd.causal_importances(model, tokens)["blocks.1.attn.W_Q"]
        assert torch.equal(other.run_with_cache(tokens)[1]["q_ci", 1], expected)
        with attached.masked("ci"), pytest.raises(ValueError, match="stop_at_layer skips blocks"):
            other(tokens, stop_at_layer=1)
