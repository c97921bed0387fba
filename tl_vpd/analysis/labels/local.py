"""A causal language model of transformers, in this process, as labeller or judge.

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
    """Answers with the most probable choice, or, to open questions, with the most probable text token by token.

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
        training = self.model.training
        self.model.eval()
        try:
            return [self._answer(question) for question in tqdm(questions, desc=self.name, disable=not progress)]
        finally:
            self.model.train(training)

    def _answer(self, question: Question) -> Any | None:
        ids = self._ids(question)
        longest = getattr(self.model.config, "max_position_embeddings", None)
        if longest is not None and ids.shape[1] + question.answer_tokens > longest:
            raise ValueError(
                f"A question has {ids.shape[1]} tokens and {self.name} reads {longest}: show fewer or shorter windows."
            )
        if question.choices is None:
            made = self.model.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=question.answer_tokens,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0,
            )
            text = question.opening + self.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
            if question.opening:
                text = text[: len(question.opening)] + text[len(question.opening) :].split('"')[0] + '"}'
        else:
            last = [self.tokenizer.encode(choice, add_special_tokens=False)[-1] for choice in question.choices]
            if len(set(last)) < len(last):
                raise ValueError(
                    f"The choices {', '.join(question.choices)} do not end in different tokens of {self.name}."
                )
            logits = self.model(ids).logits[0, -1, last]
            text = question.choices[int(logits.argmax())]
        try:
            return question.parse(text)
        except ValueError:
            return None

    def _ids(self, question: Question) -> torch.Tensor:
        """The tokens of a conversation."""
        if getattr(self.tokenizer, "chat_template", None):
            text = self.tokenizer.apply_chat_template(
                [dict(m) for m in question.messages], tokenize=False, add_generation_prompt=True
            )
        else:
            text = "\n\n".join([*(m["content"] for m in question.messages), "Answer: "])
        encoded = self.tokenizer(text + question.opening, add_special_tokens=False, return_tensors="pt")
        return encoded["input_ids"].to(next(self.model.parameters()).device)
