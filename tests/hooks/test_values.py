"""Mean- and resample-ablation: activations moved to other values, and where the values come from."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.tiny import decomposition_of, draw, edited, some_tokens, tiny_model
from tl_vpd import bundled
from tl_vpd.hooks import ComponentActs

OUT = "blocks.1.mlp.W_out"
ADDRESSES = [f"{OUT}:2", f"{OUT}:4"]
NAMES = ["blocks.1.hook_mlp_out", "blocks.1.hook_out_component_acts"]


def at(pos, n=7):
    where = torch.zeros(n, dtype=torch.bool)
    where[slice(None) if pos is None else pos] = True
    return where[:, None]


@pytest.mark.parametrize("amount", [1.0, 0.25, 0.0, 2.0])
@pytest.mark.parametrize("pos", [None, 3, [0, -1], slice(2, 5)])
@pytest.mark.parametrize("shape", [(6,), (2, 7, 6), (1, 7, 6), (2, 1, 6)])
def test_the_output_moves_by_amount_times_value_minus_activation(model, vpd, tokens, shape, pos, amount):
    values = {OUT: draw(*shape, seed=4) * 3 - 1}
    with torch.no_grad(), vpd.attach(model) as attached:
        _, cache = model.run_with_cache(tokens, names_filter=NAMES)
        with attached.ablated(ADDRESSES, pos=pos, amount=amount, values=values):
            _, moved = model.run_with_cache(tokens, names_filter=NAMES)
        U, acts = vpd.U[OUT], cache["out_component_acts", 1]
        change = sum(amount * (values[OUT].expand(2, 7, 6) - acts)[..., c, None] * U[c] for c in (2, 4))
    expected = cache["mlp_out", 1] + torch.where(at(pos), change, 0.0)
    assert_close(moved["mlp_out", 1], expected, rtol=1e-10, atol=1e-11)
    wanted = acts.clone()
    wanted[..., [2, 4]] = torch.where(
        at(pos), acts[..., [2, 4]] + amount * (values[OUT] - acts)[..., [2, 4]], acts[..., [2, 4]]
    )
    assert_close(moved["out_component_acts", 1], wanted, rtol=1e-10, atol=1e-11)


def test_mean_ablation_of_all_of_a_site_is_the_constant_that_the_mean_writes(model, vpd, tokens):
    """With every activation at its mean and Δ out, the site puts out mean @ U + b everywhere."""
    mean = vpd.component_acts(model, tokens).mean()
    every = [f"{OUT}:{i}" for i in range(6)]
    with torch.no_grad(), vpd.attach(model):
        hooks = [*vpd.ablation_hooks(every, values=mean), *vpd.delta_hooks(0.0, sites=OUT)]
        with model.hooks(fwd_hooks=hooks):
            _, cache = model.run_with_cache(tokens, names_filter=NAMES[:1])
        expected = mean[OUT] @ vpd.U[OUT] + model.blocks[1].mlp.b_out
    assert_close(cache["mlp_out", 1], expected.expand(2, 7, 8), rtol=1e-10, atol=1e-11)


def test_resampling_a_whole_site_from_other_prompts_is_their_output(model, vpd, tokens):
    """With all activations of other prompts, and the other prompts' input to Δ too, nothing of these prompts is left."""
    other = some_tokens(seed=7)
    values = vpd.component_acts(model, other)
    with torch.no_grad(), vpd.attach(model):
        _, theirs = model.run_with_cache(other, names_filter=["blocks.1.mlp.hook_post", *NAMES])
        hooks = vpd.ablation_hooks([f"{OUT}:{i}" for i in range(6)], values=values)
        with model.hooks(fwd_hooks=[*hooks, ("blocks.1.mlp.hook_post", lambda x, hook: theirs["post", 1])]):
            _, cache = model.run_with_cache(tokens, names_filter=NAMES)
    assert_close(cache["mlp_out", 1], theirs["mlp_out", 1], rtol=1e-10, atol=1e-11)
    assert_close(cache["out_component_acts", 1], values[OUT], rtol=1e-10, atol=1e-11)


def test_zero_values_are_plain_ablation_also_under_a_mask(model, vpd, tokens):
    zeros = {OUT: torch.zeros(6)}
    with torch.no_grad(), vpd.attach(model) as attached:
        for context in (attached.masked("unmasked", delta=1.0), attached.masked("ci"), attached.masked("rounded")):
            with context:
                a = model.run_with_hooks(tokens, fwd_hooks=vpd.ablation_hooks(ADDRESSES))
                b = model.run_with_hooks(tokens, fwd_hooks=vpd.ablation_hooks(ADDRESSES, values=zeros))
            assert_close(a, b, rtol=1e-10, atol=1e-11)
    mask = torch.ones(6, dtype=torch.float64)
    mask[[2, 4]] = 0
    with torch.no_grad(), vpd.attach(model):
        got = model.run_with_hooks(tokens, fwd_hooks=vpd.ablation_hooks(ADDRESSES, values=zeros))
    assert_close(got, edited(model, vpd, {OUT: (mask, 1.0)})(tokens), rtol=1e-10, atol=1e-10)


def test_means_are_over_tokens_or_over_the_batch_at_each_position(model, vpd, tokens):
    acts = vpd.component_acts(model, tokens)
    assert list(acts) == list(vpd.sites) and len(acts) == 12
    with torch.no_grad(), vpd.attach(model):
        _, cache = model.run_with_cache(tokens)
    for n, site in vpd.sites.items():
        activations = cache[site.hook_name("component_acts")]
        assert_close(acts[n], activations, rtol=1e-12, atol=1e-12)
        assert_close(acts.mean()[n], activations.sum((0, 1)) / 14, rtol=1e-12, atol=1e-12)
        assert_close(acts.mean(by_position=True)[n], activations.sum(0, keepdim=True) / 2, rtol=1e-12, atol=1e-12)
    with pytest.raises(KeyError, match=r"did you mean 'blocks\.1\.mlp\.W_out'"):
        acts["blocks.1.mlp.W_ou"]


@pytest.fixture(scope="module")
def padded():
    """The bundled model and two prompts of which the first is padded on the left."""
    model, vpd = bundled.model(kind="hooked_transformer"), bundled.decomposition()
    model.tokenizer.padding_side = "left"
    prompts = ["def f(x):", "def longer(name, value):\n    return"]
    return model, vpd, prompts


def test_padding_is_left_out_of_means(padded):
    model, vpd, prompts = padded
    acts = vpd.component_acts(model, prompts)
    assert acts.token_mask is not None and not bool(acts.token_mask.all())
    each = [vpd.component_acts(model, p) for p in prompts]
    for n in vpd.sites:
        together = torch.cat([e[n][0] for e in each])
        assert_close(acts.mean()[n], together.mean(0), rtol=0, atol=2e-5)
    (by_position,) = acts.mean(by_position=True)[OUT]
    first_real = int(acts.token_mask[0].int().argmax())
    assert_close(by_position[0], acts[OUT][1, 0], rtol=1e-5, atol=1e-6)
    assert first_real > 0
    assert_close(by_position[-1], acts[OUT][:, -1].mean(0), rtol=1e-5, atol=1e-6)


def test_an_attention_mask_says_what_is_padding_and_a_position_without_tokens_has_no_mean(padded):
    model, vpd, _ = padded
    tokens = bundled.tokens("validation")[:2, :5]
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    acts = vpd.component_acts(model, tokens, attention_mask=mask)
    assert_close(acts.mean(by_position=True)[OUT][0, 1], acts[OUT][1, 1], rtol=1e-5, atol=1e-6)
    mask[1, 0] = 0
    acts = vpd.component_acts(model, tokens, attention_mask=mask)
    with pytest.raises(ValueError, match=r"padding in every row.*by_position=False"):
        acts.mean(by_position=True)
    assert_close(acts.mean()[OUT], acts[OUT][mask.bool()].mean(0), rtol=1e-5, atol=1e-6)


def test_values_of_another_precision_are_taken_in_the_models(tokens):
    model = tiny_model(dtype=torch.bfloat16)
    vpd = decomposition_of(model)
    acts = vpd.component_acts(model, tokens)
    assert acts[OUT].dtype == torch.bfloat16
    with torch.no_grad(), vpd.attach(model):
        for values in ({OUT: draw(6)}, acts.mean()):
            out = model.run_with_hooks(tokens, fwd_hooks=vpd.ablation_hooks(ADDRESSES, values=values))
            assert out.dtype == torch.bfloat16 and bool(out.isfinite().all())


def test_means_work_with_a_kv_cache_and_activations_of_a_prompt_say_that_they_do_not(model, vpd, tokens):
    from .test_generate import generate, greedy

    acts = vpd.component_acts(model, tokens)
    with torch.no_grad(), vpd.attach(model) as attached:
        with attached.ablated(ADDRESSES, values=acts.mean()):
            assert torch.equal(generate(model, tokens), greedy(model, tokens))
        with attached.ablated(ADDRESSES, values=acts), pytest.raises(ValueError, match="generation with a KV cache"):
            generate(model, tokens)


def test_activations_are_those_of_the_target_inside_contexts_and_hooks(model, vpd, tokens):
    expected = vpd.component_acts(model, tokens)
    with torch.no_grad(), vpd.attach(model) as attached, attached.masked("zero"), attached.ablated(ADDRESSES):
        result = vpd.component_acts(model, tokens)
    assert all(torch.equal(result[n], expected[n]) for n in vpd.sites)
    with torch.inference_mode():
        result = vpd.component_acts(model, tokens)
    assert all(torch.equal(result[n], expected[n]) for n in vpd.sites)
    with vpd.attach(model), torch.enable_grad():  # and what came of inference mode may be used with gradients
        flipped = {OUT: result[OUT].flip(1)}
        model.run_with_hooks(tokens, fwd_hooks=vpd.ablation_hooks(ADDRESSES, values=flipped)).square().sum().backward()
    assert bool((vpd.U[OUT].grad[[2, 4]] != 0).all())


def test_means_over_many_rows_are_those_of_half_precision_too():
    acts = torch.full((900, 2, 3), 100.0, dtype=torch.float16)
    mask = torch.ones(900, 2, dtype=torch.bool)
    mask[::2, 1] = False
    for mean in (
        ComponentActs({OUT: acts}, mask).mean(by_position=True),
        ComponentActs({OUT: acts}).mean(by_position=True),
    ):
        assert mean[OUT].dtype == torch.float16 and torch.equal(mean[OUT], acts[:1])
