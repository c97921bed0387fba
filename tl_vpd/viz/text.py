"""Text that goes into HTML, scripts and plots: escaped, and with characters one can see.

Texts come from tokenizers, models and files, and may hold anything: markup, control characters, marks that turn the direction of
writing, halves of surrogate pairs, thousands of characters.

>>> visible("\\n        return")
'⏎·×8return'
>>> escape("<b>\\u202e")
'&lt;b&gt;\\\\u202e'
>>> for_script({"token": "</script>"})
'{"token": "\\\\u003c/script\\\\u003e"}'
"""

from __future__ import annotations

import html
import json
import re
from typing import Any

LONG = 4
"""Runs of this many spaces or more are counted where ``visible`` shows them."""
LONGEST = 120
"""Most characters of a token or label; of longer ones the beginning is shown, with their number."""


def printable(text: str) -> str:
    """Characters that cannot be seen, or that move others, as their codes; line breaks, tabs and spaces stay."""
    return "".join(c if c.isprintable() or c in "\n\t\u00a0" else c.encode("unicode_escape").decode() for c in text)


def escape(text: str) -> str:
    """Text for HTML, in elements and in quoted attributes."""
    return html.escape(printable(text))


def for_script(value: Any, *, compact: bool = False) -> str:
    """JSON that is safe inside a ``<script>`` element: no ``<``, ``>``, ``&`` and no line separators of JavaScript.

    Raises:
        ValueError: a number is not finite, which JSON cannot hold.
    """
    separators = (",", ":") if compact else None
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=separators)  # ASCII: U+2028 too
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def label(text: str) -> str:
    """One line of bounded length: line breaks and tabs as signs, other characters as ``printable`` shows them (not escaped)."""
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]}…\u00a0({len(text):,}\u00a0characters)"
    return printable(text.replace("\r\n", "⏎").replace("\n", "⏎").replace("\r", "␍").replace("\t", "⇥"))


def breakable(address: str) -> str:
    """An address for HTML that breaks into lines after its dots."""
    return escape(address).replace(".", ".<wbr>")


def visible(token: str) -> str:
    """A single token, as in a table: spaces are dots, long runs of them counted (not yet escaped)."""
    return re.sub(" +", lambda run: "·" * n if (n := len(run[0])) < LONG else f"·×{n}", label(token))


def spaced(token: str) -> str:
    """A token in its text: spaces become spaces that do not collapse (not yet escaped)."""
    return label(token).replace(" ", "\u00a0")


def not_drawn(count: int) -> str:
    """A paragraph of HTML that says how many numbers a picture leaves out since they are NaN or infinite (none: empty)."""
    numbers = "1 number is" if count == 1 else f"{count:,} numbers are"
    return f'<p class="note">{numbers} NaN or infinite and not drawn.</p>' if count else ""


def number(value: float) -> str:
    """Three significant digits with a true minus sign; a dash for NaN."""
    if value != value:
        return "–"
    text = f"{float(f'{value:.3g}'):,.0f}" if 999.5 <= abs(value) < 999_500 else f"{value:.3g}"
    return text.replace("-", "−").replace("inf", "∞")
