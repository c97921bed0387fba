"""Threads take turns at a model: they wait, are refused in the end, and never for a thread that is gone."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from tl_vpd.forward import MaskedModel, turns
from tl_vpd.forward.turns import Turns, turn, turns_of


def in_thread(function):
    """What a function gives in another thread, or its exception."""
    result = []

    def work():
        try:
            result.append(function())
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=work, name="the other")
    thread.start()
    thread.join(timeout=60)
    assert not thread.is_alive(), "it does not end"
    return result[0]


def test_a_call_waits_until_the_model_is_free(model, vpd, tokens):
    clean, results = model(tokens), []
    thread = threading.Thread(target=lambda: results.append(model(tokens)))
    with MaskedModel(vpd, model) as masked_model:
        thread.start()
        thread.join(timeout=0.2)
        assert thread.is_alive() and not results
        masked_model.clean(tokens)
    thread.join(timeout=60)
    assert torch.equal(results[0], clean)


def test_a_thread_that_waits_too_long_is_refused_by_name(model, vpd, tokens, monkeypatch):
    monkeypatch.setattr(turns, "WAIT", 0.05)
    with MaskedModel(vpd, model):
        for call in (lambda: model(tokens), lambda: vpd.causal_importances(model, tokens), lambda: vpd.attach(model)):
            error = in_thread(call)
            assert isinstance(error, RuntimeError), error
            assert str(error) == (
                "Thread 'the other' has waited 0.05 seconds for this model, which thread 'MainThread' is using: let that end "
                "first, or give each thread a copy of the model."
            )
    assert isinstance(in_thread(lambda: model(tokens)), torch.Tensor)


@pytest.mark.parametrize("method", ["masked", "hooks"])
def test_calls_of_other_threads_are_refused_inside_a_context(model, vpd, tokens, method):
    with vpd.attach(model) as attached:
        clean = model(tokens)
        context = (
            attached.masked("zero")
            if method == "masked"
            else model.hooks(fwd_hooks=[("hook_embed", lambda x, hook: 0 * x)])
        )
        with context:
            inside = model(tokens)
            for call in (lambda: model(tokens), lambda: model.run_with_cache(tokens)):
                error = in_thread(call)
                assert isinstance(error, RuntimeError)
                assert "is in a context of masks or hooks in thread 'MainThread', which would act on" in str(error)
            ci = in_thread(lambda: vpd.causal_importances(model, tokens).concatenated)
            assert torch.equal(model(tokens), inside) and not torch.equal(inside, clean)
        assert torch.equal(in_thread(lambda: model(tokens)), clean)
    assert torch.equal(ci, vpd.causal_importances(model, tokens).concatenated)


def test_a_thread_that_has_ended_in_its_turn_does_not_block(model, tokens):
    clean = model(tokens)
    in_thread(lambda: turns_of(model).begin(object()))
    with turn(model):
        assert torch.equal(model(tokens), clean)


def test_a_use_may_end_while_another_begins():
    uses, ended = Turns(), []

    def end_inside():
        with uses._guard:  # as a garbage collection in the middle of begin() does
            uses.end("one")
        ended.append(True)

    uses.begin("one")
    uses.begin("two")
    in_thread(end_inside)
    uses.end("one")
    assert ended and uses.uses == {"two"}
    uses.end("two")
    uses.end("two")
    assert uses.owner is None


def test_a_turn_that_nobody_ended_ends_when_it_is_garbage_collected(model):
    def interrupted():
        turn(model).__enter__()

    interrupted()
    gc.collect()
    assert turns_of(model).owner is None
