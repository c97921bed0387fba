"""A hook of mkdocs: links of pages to files outside ``docs/`` lead to the site's copies of them."""

from __future__ import annotations

import re
from typing import Any

TO_NOTEBOOK = re.compile(r"\]\(\.\./examples/([^)#]+\.ipynb)")
TO_FILE = re.compile(r"\]\(\.\./([^)#]+\.(?:py|json|yaml))")
TO_FOLDER = re.compile(r"\[([^\]]*)\]\(\.\./[^)]*\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with such links changed; a link to a folder becomes plain text."""
    markdown = TO_NOTEBOOK.sub(r"](notebooks/\1", markdown)
    markdown = TO_FILE.sub(r"](source/\1.md", markdown)
    return TO_FOLDER.sub(r"\1", markdown)
