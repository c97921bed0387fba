"""A causal language model of transformers, in this process, as labeller or judge.

Small models prefer one of the choices whatever they are asked. Over a group of questions, each choice therefore loses the mean of
its log-probability (batch calibration, Zhou et al. 2024, arXiv 2309.17249):

    answer = argmax_c [ log p(c | question) − mean over the group of log p(c | ·) ]

>>> model = AutoModelForCausalLM.from_pretrained(folder)              # doctest: +SKIP
>>> small = LocalModel(model, AutoTokenizer.from_pretrained(folder))  # doctest: +SKIP
>>> score_labels(fires, LanguageJudge(small), labels=labels)                 # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from tl_vpd.analysis.labels.asking import Question
from tl_vpd.checks import flag, instance, text_of


class LocalModel:
    """Answers with the most probable choice, beside the mean of the question's group if it has one; to open questions, with the
    most probable text token by token.

    Args:
        model: a causal language model of transformers, which stays where it is.
        tokenizer: of the model; its chat template is used, if it has one.
        name: as labels and tables show it (None: the model's path or class).
    """

    compares_choices = True

    def __init__(self, model: nn.Module, tokenizer: Any, *, name: str | None = None) -> None:
        self.model, self.tokenizer = instance("model", model, nn.Module), tokenizer
        if not callable(getattr(model, "generate", None)) or not hasattr(model, "config") or not callable(tokenizer):
            raise TypeError(
                "Give a causal language model of transformers and its tokenizer, as AutoModelForCausalLM loads them."
            )
        default = getattr(model.config, "_name_or_path", "") or type(model).__name__
        self.name = text_of("name", default if name is None else name)

    @torch.no_grad()
    def ask(self, questions: Sequence[Question], *, progress: bool = True) -> list[Any | None]:
        """Asks all questions, one after the other.

        Args:
            questions: with choices or open.
            progress: show a bar.

        Returns:
            The parsed answers (None: an open question's is not as asked for).

        Raises:
            TypeError: ``progress`` is not True or False.
            ValueError: a question is longer than the model's context, or the choices are not different tokens.
        """
        flag("progress", progress)
        training, reading = self.model.training, Reading(self.model)
        self.model.eval()
        try:
            bar = tqdm(questions, desc=self.name, disable=not progress)
            answers = [self._written(q) if q.choices is None else self._weights(q, reading) for q in bar]
        finally:
            self.model.train(training)
        groups: dict[tuple[Any, ...], list[Any]] = {}
        for i, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            if question.choices is not None:
                groups.setdefault((question.choices, question.group or i), []).append(answer)
        for weights in groups.values():
            mean = torch.stack(weights).mean(0) if len(weights) > 1 else 0
            for weight in weights:
                weight -= mean
        return [_parsed(q, a) for q, a in zip(questions, answers, strict=True)]

    def _written(self, question: Question) -> str:
        """What the model writes."""
        ids = self._ids(question)
        made = self.model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=question.answer_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0,
        )
        text = question.opening + str(self.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
        if question.opening:
            text = text[: len(question.opening)] + text[len(question.opening) :].split('"')[0] + '"}'
        return text

    def _weights(self, question: Question, reading: Reading) -> torch.Tensor:
        """The log-probability of each choice among all choices."""
        choices = question.choices or ()
        last = [self.tokenizer.encode(choice, add_special_tokens=False)[-1] for choice in choices]
        if len(set(last)) < len(last):
            raise ValueError(f"The choices {', '.join(choices)} do not end in different tokens of {self.name}.")
        return reading.logits(self._ids(question))[last].float().log_softmax(0)

    def _ids(self, question: Question) -> torch.Tensor:
        """The tokens of a conversation; raises ValueError if they and the answer are more than the model reads."""
        if getattr(self.tokenizer, "chat_template", None):
            text = self.tokenizer.apply_chat_template(
                [dict(m) for m in question.messages], tokenize=False, add_generation_prompt=True
            )
        else:
            text = "\n\n".join([*(m["content"] for m in question.messages), "Answer: "])
        ids = self.tokenizer(text + question.opening, add_special_tokens=False, return_tensors="pt")["input_ids"]
        longest = getattr(self.model.config, "max_position_embeddings", None)
        if longest is not None and ids.shape[1] + question.answer_tokens > longest:
            raise ValueError(
                f"A question has {ids.shape[1]} tokens and {self.name} reads {longest}: show fewer or shorter windows."
            )
        return ids.to(next(self.model.parameters()).device)


class Reading:
    """Questions to one model in order: the tokens with which the last one began too are not run again.

    Only a cache whose every layer has all keys and values can be cut; with another one each question runs whole.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.ids = model, torch.empty(1, 0)
        self.cache: Any = None

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """The logits after the last token, ``[vocab]``."""
        n, past = 0, {}
        if self.cache is not None:
            n = min(ids.shape[1] - 1, self.ids.shape[1])
            n = int((ids[0, :n] == self.ids[0, :n]).long().cumprod(0).sum())
            if n < self.ids.shape[1]:
                self.cache.crop(n - self.ids.shape[1])  # takes away so many
            past = {"past_key_values": self.cache}
        output = self.model(ids[:, n:], use_cache=True, **past)
        cache = getattr(output, "past_key_values", None)
        whole = all(type(layer).__name__ == "DynamicLayer" for layer in getattr(cache, "layers", [None]))
        self.ids, self.cache = ids, cache if whole else None
        return output.logits[0, -1]


def _parsed(question: Question, answer: Any) -> Any | None:
    """The answer, written or the choice of the largest weight (None: it is not as asked for)."""
    try:
        return question.parse(answer if question.choices is None else question.choices[int(answer.argmax())])
    except ValueError:
        return None
