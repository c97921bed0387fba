r"""Text for Markdown: whatever a record or report holds cannot become markup, HTML or a link.

>>> plain("<b>W_[Q|K]</b> https://x.org")
'&lt;b&gt;W\\_\\[Q\\|K\\]&lt;/b&gt; https:&#47;&#47;x.org'
>>> print(table(["site", "KL"], [["a|b", 0.25], ["c", None]]))
| site | KL |
| --- | --- |
| a\|b | 0.25 |
| c | – |
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

LONGEST = 200
"""Characters of a value."""
LONGEST_BLOCK = 20_000
"""Characters of a block of code."""
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def plain(value: Any, *, longest: int = LONGEST) -> str:
    """A value as text of one line without markup, cut after ``longest`` characters."""
    text = "".join(c if c.isprintable() else " " for c in str(value))
    text = " ".join(text.split())
    text = text if len(text) <= longest else text[: longest - 1] + "…"
    text = "".join(_ENTITIES.get(c, c) for c in text)
    text = re.sub(r"([\\`*_\[\]{}|~$#@!])", r"\\\1", text)
    text = text.replace("://", ":&#47;&#47;").replace("www.", "www&#46;")
    return re.sub(
        r"^([-+=>]|\d+[.)](?=\s|$))", lambda m: f"{m[0][:-1]}\\{m[0][-1]}", text
    )  # a list, a heading's underline


def figure(value: Any) -> str:
    """A number to four digits, integers whole; ``–`` for what is missing or not finite, anything else as text."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else plain(value)


def table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table with one column per header."""
    lines = [[plain(h) for h in headers], ["---"] * len(headers), *([figure(v) for v in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def block(text: str, language: str) -> str:
    """A block of code, whose fence is longer than any in the text."""
    if len(text) > LONGEST_BLOCK:
        text = f"{text[:LONGEST_BLOCK]}\n... ({len(text) - LONGEST_BLOCK} more characters are in config.json)"
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
