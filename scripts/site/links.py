"""A hook of mkdocs: links to files outside ``docs/`` lead to the site's copies of them, and links to pages have their titles."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"
TO_NOTEBOOK = re.compile(r"\]\(\.\./examples/([^)#]+\.ipynb)")
TO_FILE = re.compile(r"\]\(\.\./([^)#]+\.(?:py|json|yaml))")
TO_FOLDER = re.compile(r"\[([^\]]*)\]\(\.\./[^)]*\)")
TO_PAGE = re.compile(r"\[(\w+\.md)\](?=\(\1)")
"""A link whose text is the name of the page's file."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with such links changed; a link to a folder becomes plain text."""
    markdown = TO_NOTEBOOK.sub(r"](notebooks/\1", markdown)
    markdown = TO_FILE.sub(r"](source/\1.md", markdown)
    markdown = TO_PAGE.sub(lambda match: f"[{_title(match[1])}]", markdown)
    return TO_FOLDER.sub(r"\1", markdown)


def _title(page: str) -> str:
    heading, *_ = (DOCS / page).read_text(encoding="utf-8").splitlines()
    return heading.removeprefix("# ")
