"""Questions to language models, and their answers.

A language model that labels or judges has a ``name`` and answers with ``ask``: an ``Endpoint`` on a network, or a ``LocalModel``
in this process.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from tl_vpd.files.json_files import parse_json

Message = Mapping[str, str]
"""``role`` (system, user) and ``content``."""
_FENCE = re.compile(r"\A\s*```(?:json)?\s*\n(.*?)\n?```\s*\Z", re.DOTALL)
_WORDS = re.compile(r"\w{1,4}|[^\w\s]|\s+")


@dataclass(frozen=True)
class Question:
    """A question and what counts as its answer.

    Attributes:
        messages: of the conversation.
        parse: reads an answer; raises ValueError, in one sentence, for one that is not as asked for.
        answer_tokens: the longest answer.
        choices: the answers that are allowed, of which the model takes the most probable one (None: it writes text).
        opening: how an answer in JSON with one text begins, which a small model in this process has only to continue.
        group: of questions with the same choices, whose answers are weighed against each other (empty: each for itself).
    """

    messages: tuple[Message, ...]
    parse: Callable[[str], Any]
    answer_tokens: int = 200
    choices: tuple[str, ...] | None = None
    opening: str = ""
    group: str = ""

    @property
    def tokens(self) -> int:
        """About how many tokens are sent: pieces of at most four letters, single signs, runs of spaces, and 8 for each message.

        Tokenizers of language models make about as many of plain English, and fewer of longer words.
        """
        return sum(8 + len(_WORDS.findall(message["content"])) for message in self.messages)


@runtime_checkable
class LanguageModel(Protocol):
    """What answers questions."""

    @property
    def name(self) -> str:
        """As labels and tables show it."""
        ...

    @property
    def compares_choices(self) -> bool:
        """Whether it answers questions with ``choices`` by comparing these; otherwise it writes text."""
        ...

    def ask(self, questions: Sequence[Question], *, progress: bool = True) -> list[Any | None]:
        """The parsed answers (None: it has failed to give one)."""
        ...


def field_of(text: str, name: str) -> Any:
    """The value of the one field that an answer in JSON must have; a fence of Markdown around it is taken off.

    Args:
        text: of the answer.
        name: of the field.

    Raises:
        ValueError: it is not such an object.
    """
    fenced = _FENCE.match(text)
    content = parse_json(fenced[1] if fenced else text.strip(), "The answer")
    if not isinstance(content, dict) or name not in content:
        raise ValueError(f"The answer is not a JSON object with {name!r}.")
    return content[name]
