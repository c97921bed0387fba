"""The checks of cells about what the model is given: left padding, and a KV cache."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.matrix import oracle
from tests.matrix.checks import Case, close, moved
from tests.matrix.models import tokenizer

PADS = 3


@torch.no_grad()
def padding_is_left_out(case: Case) -> None:
    """Importances and masked logits of a left-padded prompt are those of the prompt alone (explicit attention mask)."""
    model, vpd = case.model, case.vpd
    alone = case.tokens[:1, PADS:]
    token_mask = torch.ones_like(case.tokens)
    token_mask[0, :PADS] = 0
    padded = case.tokens.clone()
    padded[0, :PADS] = 0

    def apart(what: str, run: Callable[..., Tensor], tolerance: float) -> Tensor:
        got = run(padded, attention_mask=token_mask)[0, PADS:]
        close(what, got, run(alone)[0], tolerance)
        return got

    def logits(tokens: Tensor, **arguments: Any) -> Tensor:
        return oracle.logits_of(model(tokens, **arguments))

    tolerance = max(case.tolerance, 1e-5)
    clean = apart("the model itself, padded", logits, tolerance)
    both, one = vpd.causal_importances(model, padded, attention_mask=token_mask), vpd.causal_importances(model, alone)
    assert both.token_mask is not None and torch.equal(both.token_mask, token_mask.bool()), "padding was not recognised"
    close("importances", both.concatenated[0, PADS:], one.concatenated[0], 2e-5)
    assert not bool(both.concatenated[0, :PADS].any()), "padding has importances"
    with vpd.attach(model) as attached:
        names = [site.hook_name("ci") for site in vpd.sites.values()]
        _, cache = model.run_with_cache(padded, attention_mask=token_mask, names_filter=names)
        for name, site in vpd.sites.items():
            close(f"cached importances of {name}", cache[site.hook_name("ci")], both[name], 2e-5)
        for mode in ("ci", "zero"):
            with attached.masked(mode):
                moved(mode, apart(f"the mode {mode}, padded", logits, max(tolerance, 1e-4)), clean)


@torch.no_grad()
def a_kv_cache_changes_nothing(case: Case) -> None:
    """Masks that need no importances act with a cache as edited weights do, and step by step as at once; others refuse one.

    Generation is compared with the edited model's in the same setting, since some versions' generation from standard
    positions is another with a cache than without.
    """
    model, vpd = case.model, case.vpd
    site = "blocks.1.attn.W_V"
    scales = {name: torch.linspace(-1.0, 1.0, C) for name, C in vpd.counts.items()}
    first = {name: (torch.arange(C) >= 3).double() for name, C in vpd.counts.items()}
    with tempfile.TemporaryDirectory() as folder, vpd.attach(model) as attached:
        hf_tokenizer = tokenizer(Path(folder)) if case.kind == "HookedTransformer" else None
        ways = {
            "idle": (nullcontext, {}),
            "zero on one site": (
                lambda: attached.masked("zero", sites=site),
                {site: (torch.zeros(vpd.counts[site]), 0.0)},
            ),
            "a function": (
                lambda: attached.masked(lambda name, acts: scales[name].to(acts).expand_as(acts)),
                {name: (scale, 1.0) for name, scale in scales.items()},
            ),
            "an ablation": (
                lambda: attached.ablated([f"{name}:{i}" for name in vpd.sites for i in range(3)]),
                {name: (mask, 1.0) for name, mask in first.items()},
            ),
        }
        for how, (context, edits) in ways.items():
            edited = case.edited(edits)
            for cached in (True, False):
                expected = generated(edited, case.tokens, cached, hf_tokenizer)
                with context():
                    got = generated(model, case.tokens, cached, hf_tokenizer)
                assert torch.equal(got, expected), f"{how}: other tokens than the edited model's, cache={cached}"
            if case.kind != "native":
                with context():
                    _same_logits_step_by_step(case, how)
        with attached.masked("ci"):
            expected = greedy(model, case.tokens)
            assert torch.equal(generated(model, case.tokens, False, hf_tokenizer), expected), (
                "the mode ci, without a cache"
            )
            assert torch.equal(generated(model, case.tokens, True, hf_tokenizer), expected), "the mode ci, with a cache"


def generated(model: Any, tokens: Tensor, cached: bool, hf_tokenizer: Any) -> Tensor:
    """Four tokens from the model's ``generate``; HookedTransformer's cache wants a tokenizer."""
    if hf_tokenizer is not None:
        model.tokenizer = hf_tokenizer
    settings: dict[str, Any] = dict(max_new_tokens=4, do_sample=False, stop_at_eos=False, verbose=False)
    return model.generate(tokens, use_past_kv_cache=cached, return_type="tokens", **settings)


def greedy(model: Any, tokens: Tensor) -> Tensor:
    """Four tokens by whole passes."""
    for _ in range(4):
        tokens = torch.cat([tokens, oracle.logits_of(model(tokens))[:, -1].argmax(-1, keepdim=True)], dim=1)
    return tokens


def _same_logits_step_by_step(case: Case, how: str) -> None:
    """One position at a time through a KV cache against one whole pass."""
    whole = case.logits()
    step = _stepper(case)
    for i in range(case.tokens.shape[1]):
        got = step(case.tokens[:, i : i + 1])
        close(f"{how}, position {i} through a cache", got[:, -1], whole[:, i], max(case.tolerance, 1e-9))


def _stepper(case: Case) -> Callable[[Tensor], Tensor]:
    model = case.model
    if case.kind == "HookedTransformer":
        cache = new_cache(model, len(case.tokens))
        return lambda tokens: model(tokens, past_kv_cache=cache)
    state: list[Any] = [None]

    def step(tokens: Tensor) -> Tensor:
        given = {} if state[0] is None else {"past_key_values": state[0]}
        logits, state[0] = model(tokens, return_type="logits_and_cache", use_cache=True, **given)
        return logits

    return step


def new_cache(model: Any, batch: int) -> Any:
    """An empty KV cache of a HookedTransformer."""
    try:
        from transformer_lens.past_key_value_caching import HookedTransformerKeyValueCache as Cache
    except ImportError:
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache as Cache
    return Cache.init_cache(model.cfg, "cpu", batch)
