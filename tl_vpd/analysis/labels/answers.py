"""Answers on the disk, one line of JSON each, written as they come.

    folder/answers.jsonl        {"key": "<SHA-256 of the request>", "answer": "<its text>"}

A line that was cut when a process was killed is removed when the file is next opened; any other damage is refused.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pydantic import Field

from tl_vpd.analysis.labels.asking import Question
from tl_vpd.files.atomic import named_errors
from tl_vpd.files.json_files import json_text, parse_json
from tl_vpd.files.lock import locked
from tl_vpd.frozen import Frozen

FILE = "answers.jsonl"


class _Line(Frozen):
    key: str = Field(pattern=r"^[0-9a-f]{64}$")
    answer: str = Field(max_length=1 << 20)


class AnswerFile:
    """The answers in a folder; made by ``opened``."""

    def __init__(self, path: Path, file: IO[bytes], answers: dict[str, str]) -> None:
        self._path, self._file, self._answers, self._lock = path, file, answers, threading.Lock()

    @classmethod
    @contextmanager
    def opened(cls, folder: Path) -> Iterator[AnswerFile]:
        """Reads what is there, for this process alone.

        Raises:
            OSError: another process uses the folder, or it cannot be written.
            ValueError: a line is not an answer.
        """
        with locked(folder):
            path = folder / FILE
            with named_errors(path):
                file = path.open("a+b")
            with file:
                file.seek(0)
                content = file.read()
                whole = content.rfind(b"\n") + 1
                answers = {}
                for number, line in enumerate(content[:whole].splitlines(), 1):
                    name = f"Line {number} of {path}"
                    entry = _line(parse_json(line, name), name)
                    answers[entry.key] = entry.answer
                file.truncate(whole)
                yield cls(path, file, answers)

    def parsed(self, key: str, question: Question) -> Any | None:
        """The stored answer to a question (None: there is none, or it is not as asked for)."""
        try:
            return question.parse(self._answers[key]) if key in self._answers else None
        except ValueError:
            return None

    def add(self, key: str, text: str) -> None:
        """Writes an answer, from any thread.

        Raises:
            OSError: it cannot be written.
        """
        with self._lock, named_errors(self._path, "the answers before it are stored"):
            self._file.write(json_text({"key": key, "answer": text}).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())


def key_of(request: Mapping[str, Any]) -> str:
    """What a request is known by."""
    return hashlib.sha256(json_text(dict(request)).encode()).hexdigest()


def _line(content: Any, name: str) -> _Line:
    try:
        return _Line(**content)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is not a stored answer: remove the line, or give another folder.") from error
