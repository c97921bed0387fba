"""Calls with arguments of a wrong type or value, each with the error that says what came and what to do.

A script of its own, since the tests check every argument's type before the library sees it; ``test_wrong_calls`` runs it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

import tl_vpd
from tl_vpd import analysis, bundled, evaluation, hooks
from tl_vpd.analysis import attention
from tl_vpd.masking import SiteMask

Q, K, IN = "blocks.1.attn.W_Q", "blocks.1.attn.W_K", "blocks.1.mlp.W_in"
model, vpd = bundled.model(), bundled.decomposition()
tokens = bundled.tokens("validation")[:2, :8]
prompt = tokens[:1]
anything: Any = tl_vpd


def masked(*arguments: Any, **options: Any) -> Callable[[], Any]:
    """A call of the model in ``masked``."""

    def call() -> None:
        with vpd.attach(model) as attached, attached.masked(*arguments, **options):
            model(tokens)

    return call


def attached(call: Callable[[], Any]) -> Callable[[], Any]:
    """A call while the decomposition is attached."""

    def inside() -> None:
        with vpd.attach(model), torch.no_grad():
            call()

    return inside


def ablated(*arguments: Any, **options: Any) -> Callable[[], Any]:
    """A call of the model with ablation hooks."""
    return attached(lambda: model.run_with_hooks(tokens, fwd_hooks=vpd.ablation_hooks(*arguments, **options)))


def attended(**options: Any) -> Callable[[], Any]:
    """Importances with an attention mask."""
    return lambda: vpd.causal_importances(model, tokens, **options)


CALLS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: anything.Decomposition.from_hub(5), TypeError, "repository=5 is a int: give a string"),
    (lambda: anything.Decomposition.from_hub("user/repo", revision=5), TypeError, "revision=5 is a int: give a string"),
    (lambda: vpd.push_to_hub(None), TypeError, "repository=None is a NoneType: give a string"),
    (lambda: vpd.push_to_hub("user/repo", private="yes"), TypeError, "private='yes' is a str: give True or False"),
    (
        lambda: vpd.push_to_hub("user/repo", report={}),
        TypeError,
        r"report={} is a dict: give what tl_vpd.evaluate returns",
    ),
    (lambda: vpd.push_to_hub("user/repo", card={}), TypeError, "A dict came where CardConfig is needed"),
    (lambda: vpd.model_card("repo"), ValueError, "'repo' is not the name of a repository"),
    (lambda: vpd.compact(model, tokens, threshold="0.1"), TypeError, "threshold='0.1' is a str: give a number"),
    (lambda: vpd.compact(model, tokens, batch_size=1.5), TypeError, "batch_size=1.5 is a float: give an integer"),
    (masked("rounded", threshold="0.1"), TypeError, "threshold='0.1' is a str: give a number"),
    (masked("ci", delta=[1]), TypeError, r"delta=\[1\] is a list: give a number"),
    (masked("ci", delta=float("nan")), ValueError, "delta=nan: give a finite number"),
    (masked("stochastic", seed=1.5), TypeError, "seed=1.5 is a float: give an integer"),
    (masked("adversarial", steps=1.5), TypeError, "steps=1.5 is a float: give an integer"),
    (masked("adversarial", step_size=-1.0), ValueError, "step_size=-1.0: give a finite number above 0"),
    (masked(None), TypeError, "The mode is a NoneType: give a mode's name, masks by site, or a function"),
    (masked({}), ValueError, "nothing would be masked"),
    (masked({IN: torch.zeros(416)}, sites="blocks.0.*"), ValueError, "nothing would be masked"),
    (
        masked({IN: SiteMask(None, 0.0, torch.ones(8).bool())}),
        ValueError,
        r"mask for .* is \(8,\), which leaves open",
    ),
    (masked("ci", pos="x"), TypeError, "pos='x': give an index"),
    (masked("ci", pos=1.5), TypeError, "pos=1.5: give an index"),
    (
        lambda: SiteMask(None, 0.0, torch.ones(2, 8)),
        TypeError,
        "SiteMask.routed is of torch.float32: give a tensor of bools",
    ),
    (ablated(3), TypeError, "subcomponents=3: give 'site:index'"),
    (ablated(f"{Q}:3", amount="all"), TypeError, "amount='all' is a str: give a number"),
    (ablated(f"{Q}:3", amount=float("nan")), ValueError, "amount=nan: give a finite number"),
    (ablated(f"{Q}:3", values=[1.0]), TypeError, "values is a list: give tensors by site"),
    (attached(lambda: vpd.mask_hooks(anything)), TypeError, "Masks are a module: give masks by site, or a function"),
    (attached(lambda: vpd.delta_hooks(anything)), TypeError, "is a module: give a number"),
    (attended(attention_mask=torch.ones(3, 8)), ValueError, r"attention_mask is \(3, 8\) and the tokens are \(2, 8\)"),
    (attended(attention_mask=torch.ones(8)), ValueError, r"attention_mask is \(8,\) and the tokens are \(2, 8\)"),
    (attended(attention_mask=[[1] * 8, [0] * 8]), ValueError, r"attention_mask has no real token in rows \[1\]"),
    (
        lambda: tl_vpd.attribution_graph(vpd, model, prompt, config=anything),
        TypeError,
        "A module came where GraphConfig is needed",
    ),
    (lambda: tl_vpd.evaluate(vpd, model, tokens, anything), TypeError, r"give EvaluationConfig\(...\)"),
    (lambda: tl_vpd.decompose(model, tokens, saving=anything), TypeError, "A module came where SavingConfig is needed"),
    (lambda: tl_vpd.decompose(model, tokens, execution=anything), TypeError, "came where ExecutionConfig is needed"),
    (
        lambda: evaluation.EvaluationConfig(measures="hidden"),
        TypeError,
        "measures='hidden' is a string: give names in a list",
    ),
    (lambda: analysis.prune_sweep(vpd, model, prompt, 5, [-0.1]), ValueError, "give a finite number of at least 0"),
    (
        lambda: attention.score_terms(vpd, model, prompt, anything),
        TypeError,
        "layer=.* is a module: give an integer",
    ),
    (lambda: attention.score_terms(vpd, model, prompt, 1, anything.__name__), TypeError, "pairs='tl_vpd' is a string"),
    (
        lambda: attention.attention_by_offset(vpd, model, prompt, 1, max_offset=-1),
        ValueError,
        "max_offset=-1: give an integer of at least 0",
    ),
    (lambda: attention.ov_overlap(vpd, model, prompt, 1, key=f"{Q}:3"), ValueError, "is not of blocks.1.attn.W_K"),
    (
        lambda: attention.value_given_key(vpd, model, prompt, 1, threshold=2.0),
        ValueError,
        "threshold=2.0: importances are in",
    ),
    (lambda: analysis.GraphConfig(threshold=-0.5), ValueError, "threshold=-0.5: importances are in"),
    (lambda: bundled.tokens(anything), KeyError, "the bundled tokens are 'validation' and 'training'"),
]


Call = tuple[Callable[[], Any], type[Exception] | tuple[type[Exception], ...], str]
"""A call, its error, and what the message has."""


def check(calls: Sequence[Call], model: Any) -> None:
    """Makes every call.

    Args:
        calls: with their errors and messages.
        model: must be without a decomposition after each call.

    Raises:
        AssertionError: one is accepted, or ends in another error or message, or leaves something on the model.
    """
    wrong: list[str] = []
    for i, (call, error, message) in enumerate(calls):
        try:
            call()
        except error as e:
            text = str(e.args[0])
            if not re.search(message, text):
                wrong.append(f"call {i}: {message!r} is not in {text!r}")
            if "\n" in text or not text.endswith(".") or len(text) > 500:
                wrong.append(f"call {i}: {text!r} is not a sentence")
        except Exception as e:
            wrong.append(f"call {i} ({message}) ends in {type(e).__name__}: {e}")
        else:
            wrong.append(f"call {i} ({message}) is accepted")
        if hooks.attached_to(model) is not None:
            wrong.append(f"call {i} leaves the decomposition attached")
            break
    assert not wrong, "\n".join(wrong)


if __name__ == "__main__":
    check(CALLS, model)
