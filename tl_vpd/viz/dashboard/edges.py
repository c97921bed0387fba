"""The strongest edges of a graph over many prompts, by subcomponent and by component, as the pages read them.

An edge is ``[other, weight]``: the other one's place in the harvest (-1: the embeddings) or its component's number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tl_vpd.analysis import Clustering, DatasetGraph, component_edges
from tl_vpd.analysis.clustering.clustering import COMPONENT
from tl_vpd.analysis.graph.dataset import EMBEDDINGS
from tl_vpd.viz.dashboard.records import short

Ends = dict[str, list[list[Any]]]
"""``into`` and ``from``: edges that lead to a node, and away from it."""
NO_EDGES: Ends = {"into": [], "from": []}


def edges_of(graph: DatasetGraph | None, places: Mapping[str, int], k: int) -> dict[str, Ends]:
    """The ``k`` strongest edges into and out of each subcomponent, among those that have a place."""
    if graph is None or not k:
        return {}
    names = [str(node) for node in graph.nodes]
    shown = [i for i, name in enumerate(names) if name in places]
    sources = [-1, *(places[names[i]] for i in shown)]
    signed = graph.signed[shown][:, [0, *(i + 1 for i in shown)]]
    into, out = (matrix.abs().topk(min(k, matrix.shape[1])).indices.tolist() for matrix in (signed, signed[:, 1:].T))
    return {
        names[i]: {
            "into": _nonzero((sources[j], signed[row, j]) for j in into[row]),
            "from": _nonzero((sources[j + 1], signed[j, row + 1]) for j in out[row]),
        }
        for row, i in enumerate(shown)
    }


def component_edges_of(graph: DatasetGraph | None, clustering: Clustering | None, k: int) -> dict[int, Ends]:
    """The same of components, whose members' edges are summed; the others are subcomponents that are in no component."""
    ends: dict[int, Ends] = {}
    if graph is None or clustering is None or not k:
        return ends
    table = component_edges(graph, clustering)
    for source, target, weight in zip(table["source"], table["target"], table["weight"], strict=True):
        for name, other, side in ((target, source, "into"), (source, target, "from")):
            node, number = _component(name), -1 if other == EMBEDDINGS else _component(other)
            if node is not None and number is not None:
                edges = ends.setdefault(node, {"into": [], "from": []})[side]
                if len(edges) < k:
                    edges.append([number, short(float(weight))])
    return ends


def _component(name: str) -> int | None:
    """The number in ``component:7`` (None: it is something else)."""
    kind, _, number = name.partition(":")
    return int(number) if kind == COMPONENT else None


def _nonzero(edges: Iterable[tuple[int, Any]]) -> list[list[Any]]:
    return [[place, short(float(weight))] for place, weight in edges if weight != 0]
