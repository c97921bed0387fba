"""Generation under masks with a KV cache: a causal Γ gives the same numbers token by token as over the whole prefix."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.testing import assert_close

from tests.matrix.inputs import new_cache
from tests.tiny import GAMMA, decomposition_of, options_of, some_tokens
from tl_vpd import bundled
from tl_vpd.masking.modes import NEED_IMPORTANCES

CLOSE = {"rtol": 0, "atol": 1e-9}
DETERMINISTIC = ["ci", "rounded"]
SETTINGS = dict(max_new_tokens=4, do_sample=False, stop_at_eos=False, verbose=False)


def step(model, tokens, cache):
    """Logits of new tokens (without a tokenizer, the model wants to be told that they are real)."""
    return model(tokens, past_kv_cache=cache, attention_mask=torch.ones_like(tokens))


def stepwise(model, tokens, sizes, cache=None):
    """Logits of pieces of the tokens, one after the other through a KV cache."""
    cache, logits, end = cache or new_cache(model, len(tokens)), [], 0
    for n in sizes:
        start, end = end, end + n
        logits.append(step(model, tokens[:, start:end], cache))
    return torch.cat(logits, dim=1)


@pytest.fixture
def tokens():
    return some_tokens(shape=(3, 8))


STREAMS = ["shared_transformer, residual", "chunked_transformers, residual"]


@pytest.fixture(params=["shared_transformer", "chunked_transformers", "per_site_mlps", "global_mlp", *STREAMS])
def vpd(model, request):
    kind, _, reads = request.param.partition(", ")
    gamma = {"kind": kind, "hidden": 4} if "mlps" in kind else {"kind": kind, **GAMMA}
    gamma = {**gamma, "reads": reads or "sites"}
    return decomposition_of(model, gamma={**gamma, **({"chunk": 5} if "chunked" in kind else {})}).to(torch.float64)


@pytest.mark.parametrize("sizes", [[1] * 8, [5, 1, 2], [8]])
@pytest.mark.parametrize("mode", DETERMINISTIC)
def test_logits_are_those_of_the_whole_prefix(model, vpd, tokens, mode, sizes):
    with torch.no_grad(), vpd.attach(model) as attached, attached.masked(mode):
        assert_close(stepwise(model, tokens, sizes), model(tokens), **CLOSE)


def test_importances_are_those_of_the_whole_prefix(model, vpd, tokens):
    name = "blocks.1.hook_q_ci"
    rows: list[torch.Tensor] = []
    with torch.no_grad(), vpd.attach(model), model.hooks(fwd_hooks=[(name, lambda g, hook: rows.append(g))]):
        model(tokens)
        stepwise(model, tokens, [4, 1, 3])
    assert_close(torch.cat(rows[1:], dim=1), rows[0], **CLOSE)


@pytest.mark.parametrize("mode", NEED_IMPORTANCES)
def test_every_mode_generates(model, vpd, tokens, mode):
    with torch.no_grad(), vpd.attach(model) as attached:
        with attached.masked(mode, **options_of(mode, steps=2, seed=0)):
            with_cache = model.generate(tokens[:, :6], **SETTINGS)
        with attached.masked(mode, **options_of(mode, steps=2, seed=0)):
            whole = model.generate(tokens[:, :6], use_past_kv_cache=False, **SETTINGS)
    assert with_cache.shape == whole.shape == (3, 10)
    if mode in DETERMINISTIC:
        assert torch.equal(with_cache, whole)


def test_an_attack_leaves_the_cache_as_it_is(model, vpd, tokens):
    cache = new_cache(model, len(tokens))
    with torch.no_grad(), vpd.attach(model) as attached, attached.masked("adversarial", steps=3, seed=0):
        stepwise(model, tokens, [4, 1], cache)
    assert cache[0].past_keys.shape[1] == 5


def test_modes_may_change_between_tokens_and_clean_ones_come_first(model, vpd, tokens):
    """Masks of later tokens act on keys and values of earlier ones as these were computed."""
    cache, seen = new_cache(model, len(tokens)), []
    hooks = [("blocks.0.hook_q_ci", lambda g, hook: seen.append(g))]
    with torch.no_grad(), vpd.attach(model) as attached:
        with model.hooks(fwd_hooks=hooks):
            step(model, tokens[:, :5], cache)
            with attached.masked("ci", pos=[0]):
                logits = step(model, tokens[:, 5:6], cache)
        with attached.masked("ci", pos=[5]), model.hooks(fwd_hooks=hooks):
            assert_close(logits, model(tokens[:, :6])[:, 5:], **CLOSE)
        assert_close(torch.cat(seen[:2], dim=1), seen[2], **CLOSE)
        with model.hooks(fwd_hooks=hooks), pytest.raises(ValueError, match="filled under masks"):
            step(model, tokens[:, 6:7], cache)


def test_a_frozen_cache_serves_many_continuations(model, vpd, tokens):
    cache = new_cache(model, len(tokens))
    with torch.no_grad(), vpd.attach(model) as attached, attached.masked("rounded"):
        step(model, tokens[:, :5], cache)
        cache.freeze()
        for other in (0, 1):
            more = (tokens[:, 5:] + other) % model.cfg.d_vocab
            whole = model(torch.cat([tokens[:, :5], more], dim=1))[:, 5:]
            assert_close(step(model, more, cache), whole, **CLOSE)


def test_a_cache_that_was_filled_elsewhere_is_refused(model, vpd, tokens):
    cache = new_cache(model, len(tokens))
    with torch.no_grad(), vpd.attach(model) as attached:
        step(model, tokens[:, :5], cache)
        with (
            attached.masked("ci"),
            pytest.raises(ValueError, match=r"holds 5 tokens, and importances .* for 0 of them"),
        ):
            step(model, tokens[:, 5:], cache)
        cache = new_cache(model, len(tokens))
        with attached.masked("ci"):
            step(model, tokens[:, :2], cache)
        step(model, tokens[:, 2:4], cache)
        with (
            attached.masked("ci"),
            pytest.raises(ValueError, match=r"holds 4 tokens, and importances .* for 2 of them"),
        ):
            step(model, tokens[:, 4:], cache)


def test_what_belongs_to_a_cache_goes_with_it(model, vpd, tokens):
    with torch.no_grad(), vpd.attach(model) as attached, attached.masked("ci"):
        stepwise(model, tokens, [4, 1])
        gc.collect()
        assert not attached._forward.prefixes._by_cache


@pytest.mark.parametrize("kind", ["hooked_transformer", "bridge"])
@pytest.mark.parametrize(("mode", "reads"), [*((mode, "sites") for mode in DETERMINISTIC), ("rounded", "residual")])
def test_prompts_of_unequal_length_on_both_classes(kind, mode, reads):
    """Left-padded prompts, generated together with a cache, against each prompt alone without one."""
    model = bundled.model(kind=kind)
    vpd = decomposition_of(model, C=6, gamma={**GAMMA, "reads": reads})
    prompts = ["def f(", "import os\nfor i in range", "x = ["]
    with torch.no_grad(), vpd.attach(model) as attached, attached.masked(mode):
        ids = [model.to_tokens(prompt) for prompt in prompts]
        longest = max(t.shape[1] for t in ids)
        alone = [model.generate(t, use_past_kv_cache=False, **SETTINGS)[0, -4:] for t in ids]
        together = model.generate(prompts, padding_side="left", return_type="tokens", **SETTINGS)
    assert together.shape == (3, longest + 4)
    assert torch.equal(together[:, -4:], torch.stack(alone))
