"""A language model behind an OpenAI-compatible endpoint: many questions at once, within a budget, and resumable.

    >>> endpoint = Endpoint(base_url="https://api.openai.com/v1", model="gpt-4.1-mini", input_price=0.4, output_price=1.6)
    >>> endpoint.key_variable
    'OPENAI_API_KEY'

The key is read from the environment when questions are asked. It is in no config, file or message. Redirects are not followed, as
they would carry it elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator
from tqdm.auto import tqdm

from tl_vpd.analysis.labels.answers import AnswerFile, key_of
from tl_vpd.analysis.labels.asking import Question
from tl_vpd.analysis.labels.limits import Budget, FailedError, Pace, StoppedError
from tl_vpd.analysis.labels.transport import Transport
from tl_vpd.checks import flag, path_of
from tl_vpd.frozen import Frozen

RESERVED = ("model", "messages", "stream", "n", "max_tokens", "max_completion_tokens")
"""Fields of a request that ``options`` cannot have."""
LOCAL = ("localhost", "127.0.0.1", "::1")
FEW = 10
"""Questions before the fraction of failures can stop the others."""


@dataclass(frozen=True)
class Cost:
    """What questions will cost at most, if every answer has full length and none is asked for again.

    Attributes:
        questions: how many.
        input_tokens: about how many are sent.
        output_tokens: how many may be answered.
        price: of all, in the currency of the prices (None: the prices are not known).
    """

    questions: int
    input_tokens: int
    output_tokens: int
    price: float | None

    def __str__(self) -> str:
        price = "prices are not known" if self.price is None else f"at most about {self.price:.2g}"
        return (
            f"{self.questions:,} questions, about {self.input_tokens:,} tokens sent and at most {self.output_tokens:,} "
            f"answered: {price}"
        )


class Endpoint(Frozen):
    """A model that is asked over HTTP.

    Attributes:
        base_url: up to ``/v1``; ``/chat/completions`` is added.
        model: its name there.
        key_variable: the environment variable with the key, which an endpoint on this machine may do without.
        concurrency: questions at one time.
        requests_per_minute: at most (None: no limit).
        timeout: seconds for one answer.
        retries: of a question that was not answered (429, 5xx, connection or answer broken).
        first_pause: seconds before the first retry, twice as many before each further one; or as many as the server says.
        longest_pause: seconds; where the server asks for more, the question has no answer.
        input_price: of a million tokens that are sent.
        output_price: of a million tokens that are answered.
        max_cost: questions that may cost more are not asked; needs both prices.
        max_failures: the fraction of questions without an answer above which no more are asked.
        limit_field: how the endpoint calls the longest answer.
        options: further fields of every request, such as ``{"temperature": 0}``.
        folder: in which answers are stored as they come, so that no question is asked twice (None: they are not stored).

    Raises:
        ValueError: a value is of another type or out of range.
    """

    base_url: str
    model: str = Field(min_length=1, max_length=200)
    key_variable: str = Field(default="OPENAI_API_KEY", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    concurrency: int = Field(default=8, ge=1, le=256)
    requests_per_minute: float | None = Field(default=None, gt=0)
    timeout: float = Field(default=60.0, gt=0)
    retries: int = Field(default=5, ge=0, le=20)
    first_pause: float = Field(default=1.0, ge=0)
    longest_pause: float = Field(default=120.0, ge=0)
    input_price: float | None = Field(default=None, ge=0)
    output_price: float | None = Field(default=None, ge=0)
    max_cost: float | None = Field(default=None, ge=0)
    max_failures: float = Field(default=0.2, ge=0, le=1)
    limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    options: dict[str, Any] = Field(default_factory=dict)
    folder: Path | None = None

    compares_choices: ClassVar[bool] = False

    @field_validator("folder", mode="before")
    @classmethod
    def _path(cls, value: Any) -> Any:
        return None if value is None else path_of("folder", value)

    @field_validator("base_url")
    @classmethod
    def _address(cls, value: str) -> str:
        if not value.isascii() or not value.isprintable() or " " in value:
            raise ValueError("give an address of plain signs, such as 'https://api.openai.com/v1'.")
        parts = urlsplit(value)
        if (
            parts.scheme not in ("http", "https")
            or not parts.hostname
            or "@" in parts.netloc
            or parts.query
            or parts.fragment
        ):
            raise ValueError("give an address such as 'https://api.openai.com/v1', without a user, key or query.")
        return value.rstrip("/")

    @model_validator(mode="after")
    def _fits(self) -> Endpoint:
        if self.max_cost is not None and (self.input_price is None or self.output_price is None):
            raise ValueError("max_cost would do nothing without prices: give input_price and output_price.")
        for name in self.options:
            if name in RESERVED:
                raise ValueError(f"options has {name!r}, which is set already: leave it out.")
        return self

    @property
    def name(self) -> str:
        """As labels and tables show it."""
        return self.model

    def cost(self, questions: Sequence[Question]) -> Cost:
        """What questions will cost at most, whether or not answers are stored."""
        sent, answered = sum(q.tokens for q in questions), sum(q.answer_tokens for q in questions)
        known = self.input_price is not None and self.output_price is not None
        return Cost(len(questions), sent, answered, self.price(sent, answered) if known else None)

    def price(self, sent: int, answered: int) -> float:
        """Of some tokens; unknown prices count as 0."""
        return (sent * (self.input_price or 0.0) + answered * (self.output_price or 0.0)) / 1e6

    def request(self, question: Question) -> dict[str, Any]:
        """The body of a request."""
        messages = [dict(message) for message in question.messages]
        return {**self.options, "model": self.model, "messages": messages, self.limit_field: question.answer_tokens}

    def ask(self, questions: Sequence[Question], *, progress: bool = True) -> list[Any | None]:
        """Asks all questions, and says beforehand what they may cost.

        Args:
            questions: in any number.
            progress: show the cost and a bar.

        Returns:
            The parsed answers in the order of the questions (None: it has none after all retries).

        Raises:
            TypeError: ``progress`` is not True or False.
            ValueError: the questions may cost more than ``max_cost``, or the folder holds damaged answers.
            OSError: there is no key, the endpoint cannot be reached or refuses the key or the model, more than ``max_failures``
                have no answer, or the folder is in use. The answers that came are stored.
        """
        flag("progress", progress)
        with nullcontext() if self.folder is None else AnswerFile.opened(self.folder) as stored:
            keys = [key_of(self.request(question)) for question in questions]
            answers: list[Any | None] = [None] * len(keys)
            if stored is not None:
                answers = [stored.parsed(key, q) for key, q in zip(keys, questions, strict=True)]
            missing = [i for i, answer in enumerate(answers) if answer is None]
            self._ask_missing(questions, keys, missing, answers, stored, progress)
        return answers

    def _ask_missing(
        self,
        questions: Sequence[Question],
        keys: list[str],
        missing: list[int],
        answers: list[Any | None],
        stored: AnswerFile | None,
        progress: bool,
    ) -> None:
        """Fills in the missing answers."""
        cost = self.cost([questions[i] for i in missing])
        if self.max_cost is not None and cost.price is not None and cost.price > self.max_cost:
            raise ValueError(
                f"max_cost={self.max_cost:g} is less than the cost ({cost}): ask about fewer, or raise it."
            )
        if not missing:
            return
        transport = Transport(self._key(), self, Budget(self.price, self.max_cost), Pace(self.requests_per_minute))
        if progress:
            tqdm.write(f"{self.model}: {cost}.")

        def answered(i: int) -> Any:
            text = transport.ask(questions[i])
            if stored is not None:  # in this thread: what was paid for is stored, whatever becomes of the others
                stored.add(keys[i], text)
            return questions[i].parse(text)

        failures = done = 0
        with tqdm(total=len(missing), disable=not progress) as bar, ThreadPoolExecutor(self.concurrency) as pool:
            waiting = {pool.submit(answered, i): i for i in missing}
            try:
                for future in as_completed(waiting):
                    done += 1
                    try:
                        answers[waiting[future]] = future.result()
                    except FailedError as error:
                        failures += 1
                        self._check_failures(failures, done, len(missing), error)
                    bar.update()
            finally:
                transport.stop()
                pool.shutdown(wait=False, cancel_futures=True)

    def _check_failures(self, failures: int, done: int, total: int, error: FailedError) -> None:
        if failures > self.max_failures * max(done, min(FEW, total)):
            raise StoppedError(
                f"{failures} of {done} questions to {self.model} have no answer, more than max_failures="
                f"{self.max_failures:g} allows; the last one: {str(error).rstrip('.')}."
            ) from error

    def _key(self) -> str | None:
        """The key from the environment."""
        key = os.environ.get(self.key_variable, "").strip()
        if not key and urlsplit(self.base_url).hostname in LOCAL:
            return None
        if not key:
            raise OSError(
                f"The environment variable {self.key_variable} is not set: set it to your key for {self.base_url}, or name "
                "another with key_variable."
            )
        if not key.isascii() or not key.isprintable() or " " in key:
            raise OSError(
                f"The environment variable {self.key_variable} does not hold a key: it has spaces or other signs."
            )
        return key
