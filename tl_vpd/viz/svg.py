"""Figures of matplotlib as inline SVG (an interactive library would add megabytes)."""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.text import Text

from tl_vpd.viz.text import label

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_FONT = re.compile(r"(?P<style>(?:[a-z]+\s+)*)(?P<size>[\d.]+px)\s+(?P<family>.+)")


def svg(size: tuple[float, float], draw: Callable[[Any], None]) -> str:
    """An ``<svg>`` of a figure of ``size`` inches, filled by ``draw``.

    Text stays text, dollars and all, shown as ``label`` shows it. Ids depend on the content alone, so that the same numbers give
    the same page. Style is in attributes of SVG, which need no permission of a page's policy.
    """
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "tl_vpd",
        "font.family": "sans-serif",
        "font.size": 9,
        "text.parse_math": False,
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # the browser has the fonts
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        for text in figure.findobj(Text):
            text.set_text(label(text.get_text()))
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _in_attributes(out.getvalue())


def _in_attributes(text: str) -> str:
    """The picture with its style sheet and ``style`` attributes as attributes of SVG."""
    ET.register_namespace("", SVG)
    ET.register_namespace("xlink", XLINK)
    root = ET.fromstring(text)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}style", f"{{{SVG}}}metadata"):
                parent.remove(child)
    root.attrib |= {
        "stroke-linejoin": "round",
        "stroke-linecap": "butt",
    }  # what matplotlib's style sheet says of every element
    for element in root.iter():
        for rule in element.attrib.pop("style", "").split(";"):
            name, colon, value = (part.strip() for part in rule.partition(":"))
            if colon:
                element.attrib |= _font(value) if name == "font" else {name: value}
    return ET.tostring(root, encoding="unicode")


def _font(value: str) -> dict[str, str]:
    """The attributes of a ``font`` property, such as ``bold 9px 'DejaVu Sans', sans-serif``."""
    match = _FONT.fullmatch(value)
    assert match, f"matplotlib wrote the font {value!r}"
    words = match["style"].split()
    styles = [w for w in words if w in ("italic", "oblique")]
    weights = [w for w in words if w not in (*styles, "normal")]
    attributes = {"font-size": match["size"], "font-family": match["family"]}
    return (
        attributes | dict(zip(["font-style"], styles, strict=False)) | dict(zip(["font-weight"], weights, strict=False))
    )
