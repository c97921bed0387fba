"""Wrong calls of edits: each error is one sentence that says what came.

A script, since the tests check every argument's type before the library sees it; ``tests/test_wrong_calls.py`` runs it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from tests.tiny import decomposition_of, some_tokens, tiny_model
from tests.wrong_calls import check
from tl_vpd import editing

OUT, Q = "blocks.1.mlp.W_out", "blocks.1.attn.W_Q"
model = tiny_model()
vpd = decomposition_of(model).double()
tokens = some_tokens()
edit = editing.remove(vpd, f"{OUT}:1")
wanted = editing.Wanted(3, some_tokens(shape=(4, 5)))
anything: Any = object()


def loss(logits: torch.Tensor) -> torch.Tensor:
    """A logit."""
    return logits[:, -1, 3].mean()


def edited(wrong: Any) -> None:
    """A context of something that is not an edit."""
    with vpd.attach(model) as attached:
        attached.edited(wrong)


CALLS: dict[str, tuple[Callable[[Any], Any], list[Any]]] = {
    "decomposition": (lambda v: editing.remove(v, f"{OUT}:1"), [None, 3, "vpd", model]),
    "subcomponents": (lambda c: editing.remove(vpd, c), [None, 3, [1], {"a": 1}, "x", f"{OUT}:-1", f"{OUT}:9", []]),
    "factor": (lambda f: editing.scale(vpd, f"{OUT}:1", f), [None, "2", True, float("nan"), 1, [2.0], 10**400]),
    "vector": (lambda u: editing.write_direction(vpd, f"{OUT}:1", u),
               [None, [1.0] * 8, torch.ones(2, 8), torch.full((8,), 1e400)]),
    "two of them": (lambda c: editing.write_direction(vpd, c, torch.ones(8)), [None, 3]),
    "alpha": (lambda a: editing.write_token(vpd, model, tokens, f"{OUT}:1", 3, alpha=a), [None, "3", 0, float("inf"), True]),
    "token": (lambda t: editing.write_token(vpd, model, tokens, f"{OUT}:1", t), [None, 1.5, "the", -1, 11, [3]]),
    "prompts": (lambda p: editing.write_token(vpd, model, p, f"{OUT}:1", 3), [None, 3.5, "text", [], torch.ones(2, 3)]),
    "both": (lambda b: editing.swap(vpd, model, tokens, f"{OUT}:1", f"{OUT}:2", both=b), [None, "no", 1]),
    "read": (lambda r: editing.add(vpd, OUT, r, torch.ones(8)), [None, [1.0], torch.ones(8), torch.zeros(12)]),
    "site": (lambda s: editing.add(vpd, s, torch.ones(12), torch.ones(8)), [None, 3, "W_out", ""]),
    "edit of bake": (lambda e: editing.bake(e, model), [None, vpd, {}]),
    "model of bake": (lambda m: editing.bake(edit, m), [None, "model", vpd, torch.nn.Linear(2, 2)]),
    "check_weights": (lambda c: editing.bake(edit, model, check_weights=c), [None, 1, "yes"]),
    "path": (lambda p: edit.save(p), [None, 3, "", "\0"]),
    "path to load": (lambda p: editing.Edit.load(p), [None, 3, "", "there is none"]),
    "delta": (lambda s: edit.delta(s), [None, 3, Q]),
    "k": (lambda k: edit.top(k), [None, 0, 1.5, "3"]),
    "edit": (lambda e: editing.evaluate_edit(vpd, model, tokens, e), [None, 3, {}]),
    "wanted": (lambda w: editing.evaluate_edit(vpd, model, tokens, edit, wanted=w), [3, "the", [3]]),
    "wanted token": (lambda t: editing.evaluate_edit(vpd, model, tokens, edit, wanted=editing.Wanted(t, tokens)),
                     [None, 1.5, 99]),
    "pos": (lambda p: editing.evaluate_edit(vpd, model, tokens, edit, wanted=editing.Wanted(3, tokens, p)), [None, 1.5, 7, -8]),
    "other_text": (lambda o: editing.evaluate_edit(vpd, model, tokens, edit, other_text=o),
                   [3, "text", [tokens], {"a": 3.5}]),
    "config": (lambda c: editing.evaluate_edit(vpd, model, tokens, edit, config=c), [3, {}, editing.StrengthConfig()]),
    "radius": (lambda r: editing.EditEvaluationConfig(radius=r), [None, 0, 1.5, "2"]),
    "loss": (lambda f: editing.gradient_by_subcomponent(vpd, model, tokens, f),
             [None, 3, lambda x: 3, lambda x: x, lambda x: x.sum() * float("nan")]),
    "strength loss": (lambda f: editing.tune_strengths(vpd, model, tokens, f), [None, lambda x: None]),
    "strengths of": (lambda c: editing.tune_strengths(vpd, model, tokens, loss, c), [3, [], "x"]),
    "penalty": (lambda p: editing.StrengthConfig(penalty=p), [None, -1, "1", float("nan")]),
    "batch_size": (lambda b: editing.StrengthConfig(batch_size=b), [0, 1.5, "2"]),
    "batch_size of training": (lambda b: editing.TrainingConfig(batch_size=b), [0, 1.5, "2"]),
    "seed": (lambda s: editing.StrengthConfig(seed=s), [None, 1.5, "2"]),
    "goal": (lambda g: editing.tune_strengths(vpd, model, tokens, loss, config=editing.StrengthConfig(goal=g)), ["1", [1]]),
    "examples": (lambda w: editing.train_write_direction(vpd, model, w, f"{OUT}:1"), [None, tokens, editing.Wanted(3, tokens)]),
    "probability": (lambda p: editing.TrainingConfig(probability=p), [None, 0, 1, "0.5"]),
    "finetuned": (lambda m: editing.explain_difference(vpd, model, m), [None, 3, model, tiny_model(n_layers=1)]),
    "loss without prompts": (lambda f: editing.explain_difference(vpd, model, tiny_model(seed=2), loss=f), [loss]),
    "pieces": (lambda p: editing.DifferenceConfig(pieces=p), [None, 0, 1.5]),
    "edited": (edited, [None, 3, {}, vpd]),
}  # fmt: skip


if __name__ == "__main__":
    errors = (TypeError, ValueError, KeyError, IndexError, FileNotFoundError)
    plain = r"^(?!.*object has no)(?![^:]*argument)"
    check([(partial(call, value), errors, plain) for call, values in CALLS.values() for value in values], model)
