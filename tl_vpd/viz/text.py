"""Text that goes into HTML and scripts: escaped, and with whitespace one can see.

>>> visible("\\n        return")
'⏎·×8return'
>>> for_script({"token": "</script>"})
'{"token": "\\\\u003c/script\\\\u003e"}'
"""

from __future__ import annotations

import json
import re
from html import escape
from typing import Any

__all__ = ["escape", "for_script", "number", "spaced", "visible"]

LONG = 4
"""Runs of this many spaces or more are counted where ``visible`` shows them."""


def for_script(value: Any) -> str:
    """JSON that is safe inside a ``<script>`` element: no ``<``, ``>``, ``&`` and no line separators of JavaScript.

    Raises:
        ValueError: a number is not finite, which JSON cannot hold.
    """
    text = json.dumps(value, ensure_ascii=True, allow_nan=False)  # ASCII: U+2028 and U+2029 are escaped too
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _marks(token: str) -> str:
    """Line breaks and tabs as signs, other control characters as their code."""
    token = token.replace("\r\n", "⏎").replace("\n", "⏎").replace("\r", "␍").replace("\t", "⇥")
    return "".join(c if c.isprintable() or c in "⏎␍⇥" else c.encode("unicode_escape").decode() for c in token)


def visible(token: str) -> str:
    """A single token, as in a table: spaces are dots, long runs of them counted (not yet escaped)."""
    return re.sub(" +", lambda run: "·" * n if (n := len(run[0])) < LONG else f"·×{n}", _marks(token))


def spaced(token: str) -> str:
    """A token in its text: spaces become spaces that do not collapse (not yet escaped)."""
    return _marks(token).replace(" ", "\u00a0")


def number(value: float) -> str:
    """Three significant digits with a true minus sign; a dash for NaN."""
    if value != value:
        return "–"
    return f"{value:.3g}".replace("-", "−")
