"""A panel: one picture or table that shows itself in a notebook, is saved alone, or goes on a page with others."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tl_vpd.checks import path_of, sequence, text_of
from tl_vpd.files.atomic import write_text
from tl_vpd.viz import style
from tl_vpd.viz.text import escape

_PAGE_STYLE = style.PANEL + style.PAGE


@dataclass(frozen=True)
class Panel:
    """One panel. Evaluating it in a notebook shows it; ``save`` writes it as a page.

    Attributes:
        title: plain text.
        body: HTML, in which all text is escaped. On a page, its ``style`` attributes and event handlers have no effect.
        how_to_read: plain text that a page says once, before the first of the panels that share it.
        libraries: scripts that run before the panel, on a page once for all panels that have them.
        scripts: what draws the panel; they run after its body.

    Raises:
        ValueError: the body has a script or a style sheet.
    """

    title: str
    body: str = field(repr=False)
    how_to_read: str = ""
    libraries: tuple[str, ...] = field(default=(), repr=False)
    scripts: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        for name in ("title", "body", "how_to_read"):
            text_of(name, getattr(self, name))
        if match := re.search(r"<(script|style)\b", self.body, re.IGNORECASE):
            raise ValueError(
                f"The body has a <{match[1]}>, which pages refuse: pass code as scripts=, and no style sheets."
            )

    @property
    def html(self) -> str:
        """A self-contained fragment: style, scripts where needed, and the panel. It never refers to the network."""
        how = f'<details class="how"><summary>How to read this</summary>{_paragraphs(self.how_to_read)}</details>'
        return (
            f"<style>{style.PANEL}</style>{_scripts(self.libraries)}"
            f'<section class="tlvpd">{self.body}{how if self.how_to_read else ""}</section>{_scripts(self.scripts)}'
        )

    def _repr_html_(self) -> str:
        return self.html

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes one HTML file with this panel, which opens offline; errors as for ``page``."""
        return page([self], self.title, path)


def page(panels: Sequence[Panel], title: str, path: str | os.PathLike[str], *, introduction: str = "") -> Path:
    """Writes one HTML file with all panels, which opens offline and may be sent to anyone.

    Args:
        panels: in their order on the page.
        title: of the page.
        path: of the file.
        introduction: plain text under the title; blank lines separate paragraphs.

    Returns:
        The path.

    Raises:
        ValueError: there are no panels.
        TypeError: one of them is not a ``Panel``, or an argument is of another type.
        OSError: the file cannot be written; the message names its folder. An older file is then as it was.
    """
    panels, title, path = sequence("panels", panels), text_of("title", title), path_of("path", path)
    introduction = text_of("introduction", introduction)
    if not panels:
        raise ValueError("A page needs at least one panel.")
    for panel in panels:
        if not isinstance(panel, Panel):
            raise TypeError(f"A page is made of Panels, as viz.subcomponent(...) gives; got a {type(panel).__name__}.")
    write_text(path, _document(panels, title, introduction))
    return path


def _document(panels: Sequence[Panel], title: str, introduction: str) -> str:
    links = [f'<a href="#panel-{i}">{escape(panel.title)}</a>' for i, panel in enumerate(panels)]
    sections, explained = [], {""}
    for i, panel in enumerate(panels):
        if panel.how_to_read not in explained:
            explained.add(panel.how_to_read)
            sections.append(
                '<details class="explanation"><summary>How to read this</summary>'
                f"<div>{_paragraphs(panel.how_to_read)}</div></details>"
            )
        sections.append(f'<section class="tlvpd" id="panel-{i}">{panel.body}</section>{_scripts(panel.scripts)}')
    libraries = list(dict.fromkeys(library for panel in panels for library in panel.libraries))
    policy = _policy([*libraries, *(code for panel in panels for code in panel.scripts)])
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en" data-page="tlvpd"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{_PAGE_STYLE}</style>",
            _scripts(libraries),
            f"</head><body><header><h1>{escape(title)}</h1>{_paragraphs(introduction)}",
            "</header>",
            f"<nav>{''.join(links)}</nav>" if len(panels) > 3 else "",
            *sections,
            "</body></html>",
        ]
    )


def _paragraphs(text: str) -> str:
    return "".join(f"<p>{escape(part.strip())}</p>" for part in re.split(r"\n\s*\n", text) if part.strip())


def _scripts(codes: Sequence[str]) -> str:
    return "".join(f"<script>{code}</script>" for code in codes)


def _policy(codes: Sequence[str]) -> str:
    """What a browser lets a page do: run these scripts and apply its style sheet, nothing else, and fetch nothing.

    Text that reached the page as markup would have no effect. Images are those that a script makes to save a picture.
    """
    scripts = " ".join(dict.fromkeys(_hash(code) for code in codes)) or "'none'"
    rules = ["default-src 'none'", "img-src data:", f"script-src {scripts}", f"style-src {_hash(_PAGE_STYLE)}"]
    return "; ".join([*rules, "base-uri 'none'", "form-action 'none'"])


def _hash(code: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'"
