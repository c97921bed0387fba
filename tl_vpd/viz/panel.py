"""A panel: one picture or table that shows itself in a notebook, is saved alone, or goes on a page with others."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tl_vpd.viz import style
from tl_vpd.viz.circuits import script
from tl_vpd.viz.text import escape

# Nothing is fetched, whatever a token or caption says: the browser itself refuses.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class Panel:
    """One panel. Evaluating it in a notebook shows it; ``save`` writes it as a page.

    ``body`` is HTML without the shared style and script; ``how_to_read`` is plain text that a page says once, before
    the first of the panels that share it; ``needs_circuitsvis`` says whether ``body`` has windows of text.
    """

    title: str
    body: str = field(repr=False)
    how_to_read: str = ""
    needs_circuitsvis: bool = False

    @property
    def html(self) -> str:
        """A self-contained fragment: style, script where needed, and the panel. It never refers to the network."""
        how = f'<details class="how"><summary>How to read this</summary>{_paragraphs(self.how_to_read)}</details>'
        return (
            f"<style>{style.PANEL}</style>{script() if self.needs_circuitsvis else ''}"
            f'<section class="tlvpd">{self.body}{how if self.how_to_read else ""}</section>'
        )

    def _repr_html_(self) -> str:
        return self.html

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes one HTML file with this panel, which opens offline."""
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
        TypeError: one of them is not a ``Panel``.
        OSError: the file cannot be written.
    """
    panels = list(panels)
    if not panels:
        raise ValueError("A page needs at least one panel.")
    for panel in panels:
        if not isinstance(panel, Panel):
            raise TypeError(f"A page is made of Panels, as viz.subcomponent(...) gives; got a {type(panel).__name__}.")
    path = Path(path)
    path.write_text(_document(panels, title, introduction), encoding="utf-8")
    return path


def _document(panels: Sequence[Panel], title: str, introduction: str) -> str:
    links = [f'<a href="#panel-{i}">{escape(panel.title)}</a>' for i, panel in enumerate(panels)]
    sections, explained = [], {""}
    for i, panel in enumerate(panels):
        if panel.how_to_read not in explained:
            explained.add(panel.how_to_read)
            sections.append(f'<div class="explanation">{_paragraphs(panel.how_to_read)}</div>')
        sections.append(f'<section class="tlvpd" id="panel-{i}">{panel.body}</section>')
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{style.PANEL}{style.PAGE}</style>",
            script() if any(panel.needs_circuitsvis for panel in panels) else "",
            f"</head><body><header><h1>{escape(title)}</h1>{_paragraphs(introduction)}",
            "</header>",
            f"<nav>{''.join(links)}</nav>" if len(panels) > 3 else "",
            *sections,
            "</body></html>",
        ]
    )


def _paragraphs(text: str) -> str:
    return "".join(f"<p>{escape(part.strip())}</p>" for part in re.split(r"\n\s*\n", text) if part.strip())
