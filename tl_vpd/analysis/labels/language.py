"""A language model as a judge of labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from tl_vpd.analysis.labels.asking import LanguageModel, Question, field_of
from tl_vpd.analysis.labels.firings import Firings
from tl_vpd.analysis.labels.prompts import judge_messages
from tl_vpd.analysis.labels.trials import Answer, Trial
from tl_vpd.checks import flag, instance


class LanguageJudge:
    """Judges by what a language model answers: it sees labels and excerpts, and nothing of firings in other rows.

    A model that compares choices (``LocalModel``) is asked about one excerpt at a time, any other about all excerpts of a trial.

    Args:
        model: an ``Endpoint`` or ``LocalModel``.
        progress: show the cost beforehand and a bar.
    """

    needs_labels = True

    def __init__(self, model: LanguageModel, *, progress: bool = True) -> None:
        self.model, self.progress = instance("model", model, LanguageModel), flag("progress", progress)  # type: ignore[type-abstract]
        self.name = model.name

    def answers(self, trials: Sequence[Trial], training: Firings, labels: Mapping[str, str]) -> list[Answer | None]:
        """The answers; see ``Judge``. Firings are not read."""
        questions = [self._questions(trial, labels[trial.address]) for trial in trials]
        replies = iter(self.model.ask([q for several in questions for q in several], progress=self.progress))
        answers: list[Answer | None] = []
        for several in questions:
            parts: list[Any] = [next(replies) for _ in several]
            answers.append(None if None in parts else tuple(x for part in parts for x in part))
        return answers

    def _questions(self, trial: Trial, label: str) -> list[Question]:
        n, compares = len(trial.excerpts), self.model.compares_choices
        if trial.test == "intruder":
            messages = judge_messages("intruder", trial.excerpts, label, form="digit" if compares else "number")
            parse = _digit if compares else partial(_number, n=n)
            choices = tuple(str(i + 1) for i in range(n))
            asked = choices if compares else None
            return [Question(messages, parse, answer_tokens=20, choices=asked, group=trial.test)]
        if not compares:
            messages = judge_messages(trial.test, trial.excerpts, label, form="list")
            return [Question(messages, partial(_list, n=n), answer_tokens=20 + 4 * n)]
        group = f"{trial.test} {trial.address}"  # half of an address's excerpts are of either kind
        conversations = [judge_messages(trial.test, (excerpt,), label, form="yes") for excerpt in trial.excerpts]
        return [Question(c, _yes, answer_tokens=1, choices=("0", "1"), group=group) for c in conversations]


def _digit(text: str) -> Answer:
    return (int(text) - 1,)


def _yes(text: str) -> Answer:
    return (int(text),)


def _number(text: str, *, n: int) -> Answer:
    """The number of an excerpt; raises ValueError for anything else."""
    value: Any = field_of(text, "answer")
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= n:
        raise ValueError(f"The answer is not the number of an excerpt, 1 to {n}.")
    return (value - 1,)


def _list(text: str, *, n: int) -> Answer:
    """A 0 or 1 for every excerpt; raises ValueError for anything else."""
    value: Any = field_of(text, "answer")
    if not isinstance(value, list) or len(value) != n or any(x not in (0, 1) or isinstance(x, float) for x in value):
        raise ValueError(f"The answer is not a list of {n} numbers, each 0 or 1.")
    return tuple(int(x) for x in value)
