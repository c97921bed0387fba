"""An interactive attribution graph: positions across, sites upwards, as SVG that ``graph.js`` draws from the graph's numbers.

The script names the strongest nodes in view, leaves out weak edges, searches, and traces what leads to and from a node. Nothing
else is in the page: it grows with the nodes and edges that are shown.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from tl_vpd.analysis.graph import AttributionGraph
from tl_vpd.analysis.graph.result import EMBEDDINGS, LOGITS
from tl_vpd.analysis.harvest import Harvest
from tl_vpd.checks import instance, integer, text_of
from tl_vpd.viz.panel import Panel
from tl_vpd.viz.text import escape, for_script, label, number, spaced, visible

HOW = (
    "Every circle is a subcomponent at a position (or an embedding, below, or a logit, above); its size grows with its influence "
    "on the logits, its colour with its importance. Every line is a direct effect: a blue one raises what it leads to, a dashed "
    "red one lowers it; the strongest are widest. The strongest circles in view have their names. Hover over a circle for its "
    "label, tokens and strongest edges; click it to see only what leads to it and what it leads to, and click beside the circles "
    "to see all again. The slider leaves out weak edges. Search by address or token, Enter goes to the next match. Drag the "
    "picture to move it. After a click on it the wheel and the keys + and - zoom, 0 shows all, arrows move, n and p go to the "
    "next and previous node by influence, Escape ends a trace. The page's address keeps the view.\n\n"
    "Edges are gradients times activations times importances with all other subcomponents constant: a first-order "
    "approximation, not an ablation. Nodes and edges left out of the picture are counted in its heading."
)
BUTTONS = {
    "in": ("+", "Zoom in"),
    "out": ("−", "Zoom out"),
    "all": ("all", "Show all"),
    "svg": ("SVG", "Save the view as SVG"),
    "png": ("PNG", "Save the view as PNG"),
}
"""Text and title of each button by the end of its id."""
LEGEND = (
    '<div class="legend"><span><i class="line positive"></i>raises</span><span><i class="line negative dashed"></i>lowers</span>'
    '<span>importance 0<i class="ramp"></i>1</span><span>size: influence</span></div>'
)
NEIGHBOURS = 5
"""Edges into and out of a node that its hover text lists."""


@lru_cache(maxsize=1)
def _library() -> str:
    """The script that draws."""
    return Path(__file__).with_name("graph.js").read_text(encoding="utf-8")


def graph(
    attribution: AttributionGraph,
    *,
    nodes: int = 400,
    edges: int = 3000,
    harvest: Harvest | None = None,
    labels: Mapping[str, Any] | None = None,
    title: str = "",
) -> Panel:
    """An attribution graph as a panel to walk through.

    Args:
        attribution: the graph.
        nodes: subcomponents that are shown, those of largest influence on the logits.
        edges: edges that are shown at most, the largest.
        harvest: says at which tokens a subcomponent fires (None: not shown).
        labels: texts by address, such as ``analysis.Labels`` (None: not shown).
        title: of the panel (empty: the graph's targets).

    Raises:
        TypeError: an argument is of another type.
        ValueError: ``nodes`` or ``edges`` is below 1.
    """
    instance("attribution", attribution, AttributionGraph)
    if harvest is not None:
        instance("harvest", harvest, Harvest)
    if labels is not None:
        instance("labels", labels, Mapping)  # type: ignore[type-abstract]
    title = text_of("title", title)
    nodes, edges = integer("nodes", nodes, minimum=1), integer("edges", edges, minimum=1)
    pruned = attribution.pruned(nodes=nodes)
    title = title or "Attribution graph of " + ", ".join(visible(t.text) for t in attribution.logits)
    data = _data(pruned, edges, harvest, labels or {})
    n_edges, all_edges = len(data["edges"]), len(attribution.weight)
    script = for_script(data, compact=True)
    id_ = f"tlvpd-graph-{hashlib.sha256(script.encode()).hexdigest()[:16]}"
    heading = (
        f"{int(pruned.is_subcomponent.sum()):,} of {int(attribution.is_subcomponent.sum()):,} subcomponent nodes and "
        f"{n_edges:,} of {all_edges:,} edges are shown"
    )
    buttons = " ".join(
        f'<button type="button" id="{id_}-{name}" title="{title_}">{text}</button>'
        for name, (text, title_) in BUTTONS.items()
    )
    body = (
        f'<h3>{escape(title)}</h3><p class="note">{heading}</p>'
        f'<p class="note"><label>edges <input type="range" id="{id_}-weight" min="1" max="{max(n_edges, 1)}" '
        f'value="{min(n_edges, 400)}"></label> <label>search <input type="search" id="{id_}-search" size="24"></label> '
        f"{buttons}</p>"
        f'{LEGEND}<p class="note" id="{id_}-caption" aria-live="polite"></p>'
        f'<div class="graph" id="{id_}"><pre class="tip" id="{id_}-tip" hidden></pre></div>'
    )
    call = f"tlVpdGraph({for_script(id_)}, {script})"
    return Panel(title=title, body=body, how_to_read=HOW, libraries=(_library(),), scripts=(call,))


def _data(shown: AttributionGraph, most: int, harvest: Harvest | None, labels: Mapping[str, Any]) -> dict[str, Any]:
    """What ``graph.js`` gets: nodes with their places and texts, and edges from the largest."""
    x, y = _places(shown)
    order = shown.weight.abs().argsort(descending=True, stable=True)
    ends = list(
        zip(shown.source[order].tolist(), shown.target[order].tolist(), shown.weight[order].tolist(), strict=True)
    )
    edges = [[s, t, float(f"{w:.4g}")] for s, t, w in ends]
    into: list[list[list[float]]] = [[] for _ in range(len(shown))]
    out_of: list[list[list[float]]] = [[] for _ in range(len(shown))]
    for s, t, w in edges:
        if len(into[t]) < NEIGHBOURS:
            into[t].append([s, w])
        if len(out_of[s]) < NEIGHBOURS:
            out_of[s].append([t, w])
    influence = shown.influence
    radius = (3.5 + 8.5 * (influence / influence.max().clamp_min(1e-12)).sqrt()).tolist()
    importance = zip(shown.is_subcomponent.tolist(), shown.importance.clamp(0, 1).tolist(), strict=True)
    return {
        "x": x,
        "y": y,
        "label": [label(text) for text in shown.labels],
        "name": _names(shown),
        "token": [visible(shown.words[pos]) for pos in shown.pos.tolist()],
        "edges": edges[:most],
        "radius": [round(r, 1) for r in radius],
        "importance": [round(g, 2) if subcomponent else None for subcomponent, g in importance],
        "about": _about(shown, harvest, labels),
        "into": into,
        "from": out_of,
        "rows": [_short(_site(name)) for name in shown.names],
        "columns": [_short(word, 9) for word in shown.words],
    }


def _places(shown: AttributionGraph) -> tuple[list[float], list[float]]:
    """Nodes of one site and position side by side around the position, some rows if there are many."""
    cells: dict[tuple[int, int], list[int]] = {}
    for i, cell in enumerate(zip(shown.kind.tolist(), shown.pos.tolist(), strict=True)):
        cells.setdefault(cell, []).append(i)
    x, y = [0.0] * len(shown), [0.0] * len(shown)
    for (kind, pos), members in cells.items():
        wide = min(len(members), 6)
        rows = -(-len(members) // wide)
        for j, i in enumerate(members):
            row, column = divmod(j, wide)
            x[i] = round(pos + (column - (wide - 1) / 2) * 0.13, 3)
            y[i] = round(kind + (row - (rows - 1) / 2) * min(0.2, 0.8 / rows), 3)
    return x, y


def _site(name: str) -> str:
    """``1 W_Q`` for ``blocks.1.attn.W_Q``."""
    return name.replace("blocks.", "").replace(".attn.", " ").replace(".mlp.", " ")


def _names(shown: AttributionGraph) -> list[str]:
    """What stands above each node: ``1 W_Q:12`` for a subcomponent, the token for a logit; an embedding's is on the axis."""
    names, logits = [], iter(shown.logits)
    for kind, index in zip(shown.kind.tolist(), shown.index.tolist(), strict=True):
        if shown.names[kind] == LOGITS:
            names.append(_short(visible(next(logits).text)))
        elif shown.names[kind] == EMBEDDINGS:
            names.append("")
        else:
            names.append(f"{_site(shown.names[kind])}:{index}")
    return [label(name) for name in names]


def _short(text: str, most: int = 24) -> str:
    """The beginning of a text that labels an axis or a node."""
    text = text if len(text) <= most else f"{text[: most - 2]}…"
    return visible(text) if text.isspace() else spaced(text)


def _about(shown: AttributionGraph, harvest: Harvest | None, texts: Mapping[str, Any]) -> list[list[str]]:
    """The lines of each node's hover text, above its strongest edges."""
    rows: list[dict[str, Any]] = shown.nodes().to_dict("records")  # type: ignore[assignment]
    about = []
    for subcomponent, row in zip(shown.is_subcomponent.tolist(), rows, strict=True):
        lines = [label(row["node"]), f"token {visible(row['token'])}"]
        if subcomponent:
            address = f"{row['name']}:{row['index']}"
            if address in texts:
                lines.insert(1, label(str(texts[address])))
            lines.append(f"activation {number(row['activation'])}, importance {number(row['importance'])}")
            if harvest is not None:
                lines += _tokens(harvest, address)
        about.append([*lines, f"influence {number(row['influence'])}"])
    return about


def _tokens(harvest: Harvest, address: str) -> list[str]:
    """At which tokens a subcomponent fires, and which follow."""
    record = harvest[address]
    lines = []
    for what, table in (("fires at", record.input_tokens(k=5)), ("followed by", record.output_tokens(k=5))):
        if len(table):
            lines.append(f"{what} " + " ".join(visible(token) for token in table["token"]))
    return lines
