"""An interactive attribution graph: positions across, sites upwards, rendered by plotly inlined into the page.

The page has plotly's script (4.8 MB) and the graph as data; ``graph.js`` draws it, names its strongest nodes, filters edges by
weight, searches, and traces what leads to and from a node.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from tl_vpd.analysis.graph import AttributionGraph
from tl_vpd.analysis.graph.result import EMBEDDINGS, LOGITS
from tl_vpd.analysis.harvest import Harvest
from tl_vpd.checks import instance, integer, text_of
from tl_vpd.viz.panel import Panel
from tl_vpd.viz.style import IMPORTANCE, NEGATIVE, POSITIVE
from tl_vpd.viz.text import escape, for_plotly, for_script, number, spaced, visible

HOW = (
    "Every circle is a subcomponent at a position (or an embedding, below, or a logit, above); its size grows with its influence "
    "on the logits, its colour with its importance. Every line is a direct effect: blue raises what it leads to, red lowers it; "
    "the strongest are widest. The strongest circles in view have their names. Hover over a circle for its label, tokens and "
    "strongest edges; click it to see only what leads to it and what it leads to, and click beside the circles to see all again. "
    "The slider leaves out weak edges. Search by address or token, Enter goes to the next match. On the picture the keys + and - "
    "zoom, 0 shows all, arrows move, n and p go to the next and previous node by influence, Escape ends a trace. The page's "
    "address keeps the view.\n\n"
    "Edges are gradients times activations times importances with all other subcomponents constant: a first-order "
    "approximation, not an ablation. Nodes and edges left out of the picture are counted in its heading."
)


@lru_cache(maxsize=1)
def _library() -> str:
    """plotly's script, hidden from the module loaders of notebooks, which would intercept it.

    Raises:
        ImportError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError("Graphs need plotly: pip install 'tl_vpd[viz]'.") from error
    code = get_plotlyjs().replace("</script", "<\\/script")
    # The style sheet of maps, which nothing here draws, and which the pages' policy would refuse.
    code = re.sub(r'if\(!document\.getElementById\("[0-9a-f]{64}"\)\)', "if(false)", code)
    hidden = f"(function(define,module,exports){{{code}\n}}).call(window);"
    draw = Path(__file__).with_name("graph.js").read_text(encoding="utf-8")
    return f"if(!window.Plotly){{{hidden}window.Plotly=window.Plotly||window.moduleName}}{draw}"


def graph(
    attribution: AttributionGraph,
    *,
    nodes: int = 150,
    edges: int = 1500,
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
        ImportError: plotly is not installed.
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
    script = for_script(data)
    id_ = f"tlvpd-graph-{hashlib.sha256(script.encode()).hexdigest()[:16]}"
    heading = (
        f"{int(pruned.is_subcomponent.sum())} of {int(attribution.is_subcomponent.sum()):,} subcomponent nodes and "
        f"{n_edges:,} of {all_edges:,} edges are shown"
    )
    body = (
        f'<h3>{escape(title)}</h3><p class="note">{heading}</p>'
        f'<p class="note"><label>edges <input type="range" id="{id_}-weight" min="1" max="{max(n_edges, 1)}" '
        f'value="{min(n_edges, 400)}"></label> <label>search <input type="search" id="{id_}-search" size="24"></label> '
        f'<span id="{id_}-caption"></span></p>'
        f'<div id="{id_}"></div>'
    )
    call = f"tlVpdGraph({for_script(id_)}, {script})"
    return Panel(title=title, body=body, how_to_read=HOW, libraries=(_library(),), scripts=(call,))


def _data(shown: AttributionGraph, most: int, harvest: Harvest | None, labels: Mapping[str, Any]) -> dict[str, Any]:
    """What ``_DRAW`` gets: positions, style and hover texts of nodes, and edges from the largest."""
    x, y = _places(shown)
    order = shown.weight.abs().argsort(descending=True, stable=True)[:most].tolist()
    ends = zip(shown.source[order].tolist(), shown.target[order].tolist(), shown.weight[order].tolist(), strict=True)
    influence = shown.influence
    size = (7 + 17 * (influence / influence.max().clamp_min(1e-12)).sqrt()).tolist()
    fixed = ~shown.is_subcomponent
    shades = [
        "#dfe3ea" if f else _shade(g)
        for f, g in zip(fixed.tolist(), shown.importance.clamp(0, 1).tolist(), strict=True)
    ]
    return {
        "x": x,
        "y": y,
        "labels": list(shown.labels),
        "names": _names(shown),
        "token": [visible(shown.words[pos]) for pos in shown.pos.tolist()],
        "edges": [[s, t, float(f"{w:.4g}")] for s, t, w in ends],
        "size": [round(s, 1) for s in size],
        "color": shades,
        "about": _about(shown, harvest, labels),
        "positive": POSITIVE,
        "negative": NEGATIVE,
        "rows": [for_plotly(_short(_site(name))) for name in shown.names],
        "columns": [f"{for_plotly(_short(word, 9))}<br>{i}" for i, word in enumerate(shown.words)],
        "layout": _layout(shown),
    }


def _shade(g: float) -> str:
    """White at importance 0, ``IMPORTANCE`` at 1."""
    full = [int(part) for part in IMPORTANCE[4:-1].split(",")]
    return f"rgb({', '.join(str(round(255 + (part - 255) * g)) for part in full)})"


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


def _layout(shown: AttributionGraph) -> dict[str, Any]:
    axis = {"zeroline": False, "gridcolor": "#eef0f4"}
    return {
        "height": 120 + 46 * len(shown.names),
        "margin": {"l": 90, "r": 10, "t": 10, "b": 60},
        "hovermode": "closest",
        "hoverlabel": {"align": "left", "bgcolor": "#fff", "font": {"size": 12}},
        "plot_bgcolor": "#fff",
        "dragmode": "pan",
        "xaxis": {**axis, "tickangle": 0},
        "yaxis": axis,
    }


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
    return [for_plotly(name) for name in names]


def _short(text: str, most: int = 24) -> str:
    """The beginning of a text that labels an axis or a node."""
    return spaced(text if len(text) <= most else f"{text[: most - 2]}…")


def _about(shown: AttributionGraph, harvest: Harvest | None, texts: Mapping[str, Any]) -> list[str]:
    """Each node's hover text."""
    strongest: list[tuple[list[str], list[str]]] = [([], []) for _ in range(len(shown))]
    labels = shown.labels
    order = shown.weight.abs().argsort(descending=True, stable=True).tolist()
    sources, targets, weights = shown.source.tolist(), shown.target.tolist(), shown.weight.tolist()
    for e in order:
        into, out_of = strongest[targets[e]][0], strongest[sources[e]][1]
        if len(into) < 5:
            into.append(f"{number(weights[e])} ← {for_plotly(labels[sources[e]])}")
        if len(out_of) < 5:
            out_of.append(f"{number(weights[e])} → {for_plotly(labels[targets[e]])}")
    rows: list[dict[str, Any]] = shown.nodes().to_dict("records")  # type: ignore[assignment]
    about = []
    for i, row in enumerate(rows):
        lines = [for_plotly(row["node"]), f"token {for_plotly(visible(row['token']))}"]
        if bool(shown.is_subcomponent[i]):
            address = f"{row['name']}:{row['index']}"
            if address in texts:
                lines.insert(1, for_plotly(str(texts[address])))
            lines.append(f"activation {number(row['activation'])}, importance {number(row['importance'])}")
            if harvest is not None:
                lines += _tokens(harvest, address)
        lines.append(f"influence {number(row['influence'])}")
        lines += [*strongest[i][0], *strongest[i][1]]
        about.append("<br>".join(lines))
    return about


def _tokens(harvest: Harvest, address: str) -> list[str]:
    """At which tokens a subcomponent fires, and which follow."""
    record = harvest[address]
    lines = []
    for what, table in (("fires at", record.input_tokens(k=5)), ("followed by", record.output_tokens(k=5))):
        if len(table):
            lines.append(f"{what} " + " ".join(for_plotly(visible(token)) for token in table["token"]))
    return lines
