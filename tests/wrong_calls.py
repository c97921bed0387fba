"""Calls with arguments of a wrong type or value, each with the error that says what came and what to do.

Scripts make them, since the tests check every argument's type before the library sees it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from tl_vpd import hooks

Errors = type[Exception] | tuple[type[Exception], ...]
Call = tuple[Callable[[], Any], Errors, str]
"""A call, its error, and what the message has."""


def fault(call: Callable[[], Any], errors: Errors, message: str = "") -> str:
    """What is wrong with how a call is refused; empty for one sentence.

    Args:
        call: with something wrong.
        errors: that it may end in.
        message: a pattern that the error's text has.
    """
    try:
        call()
    except errors as error:
        text = str(error.args[0])
        if not re.search(message, text):
            return f"{message!r} is not in {text!r}"
        return (
            "" if "\n" not in text and text.endswith(".") and 20 < len(text) <= 500 else f"{text!r} is not a sentence"
        )
    except Exception as error:
        return f"ends in {type(error).__name__}: {error}"
    return "is accepted"


def check(calls: Sequence[Call], model: Any) -> None:
    """Makes every call.

    Args:
        calls: with their errors and messages.
        model: must be without a decomposition after each call.

    Raises:
        AssertionError: one is accepted, or ends in another error or message, or leaves something on the model.
    """
    wrong: list[str] = []
    for i, (call, errors, message) in enumerate(calls):
        if problem := fault(call, errors, message):
            wrong.append(f"call {i} ({message}): {problem}")
        if hooks.attached_to(model) is not None:
            wrong.append(f"call {i} leaves the decomposition attached")
            break
    assert not wrong, f"{len(wrong)} calls:\n" + "\n".join(wrong)
