"""Attribution graphs with components in the place of subcomponents."""

from __future__ import annotations

import numpy as np
import pandas as pd

from tl_vpd.analysis.clustering.clustering import COMPONENT, Clustering
from tl_vpd.analysis.graph import AttributionGraph, DatasetGraph
from tl_vpd.checks import instance


def component_edges(graph: AttributionGraph | DatasetGraph, clustering: Clustering) -> pd.DataFrame:
    """The graph's edges, summed over the members of components: ``source, target, weight, edges``.

    ``component:3@5`` stands for the members of component 3 at position 5 of a prompt, ``component:3`` for those in a graph of
    many prompts (whose signed edges are summed); embeddings, logits and subcomponents that are in no component have their labels.
    Edges within a component (at one position) are left out.

    Args:
        graph: of a prompt, or of many.
        clustering: of the same decomposition.

    Returns:
        One row per pair, the largest weight first; ``edges`` is how many were summed.

    Raises:
        TypeError: an argument is of another type.
    """
    instance("graph", graph, AttributionGraph, DatasetGraph)
    instance("clustering", clustering, Clustering)
    if isinstance(graph, AttributionGraph):
        source, target, weight = (t.cpu().numpy() for t in (graph.source, graph.target, graph.weight))
    else:
        signed = graph.signed.cpu().numpy()
        target, source = signed.nonzero()
        weight, target = signed[target, source], target + 1  # the first label is the embeddings'
    number = {str(member): component.number for component in clustering for member in component.members}
    names = [_renamed(label, number) for label in graph.labels]
    unique = {name: i for i, name in enumerate(dict.fromkeys(names))}
    group = np.array([unique[name] for name in names])
    pair = group[source].astype(np.int64) * len(unique) + group[target]
    pairs, where, edges = np.unique(pair[group[source] != group[target]], return_inverse=True, return_counts=True)
    summed = np.bincount(where, weight[group[source] != group[target]], minlength=len(pairs))
    order = np.argsort(-np.abs(summed), kind="stable")
    texts = np.array(list(unique), dtype=object)
    return pd.DataFrame(
        {
            "source": texts[pairs[order] // len(unique)],
            "target": texts[pairs[order] % len(unique)],
            "weight": summed[order],
            "edges": edges[order],
        }
    )


def _renamed(label: str, number: dict[str, int]) -> str:
    """A node's label with its component in the place of the subcomponent, where it is in one."""
    address, at, pos = label.partition("@")
    return f"{COMPONENT}:{number[address]}{at}{pos}" if address in number else label
