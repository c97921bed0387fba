"""An attribution graph with components in the place of subcomponents."""

from __future__ import annotations

import pandas as pd

from tl_vpd.analysis.clustering.clustering import Clustering
from tl_vpd.analysis.graph import AttributionGraph
from tl_vpd.checks import instance


def component_edges(graph: AttributionGraph, clustering: Clustering) -> pd.DataFrame:
    """The graph's edges, summed over the members of components at each position: ``source, target, weight, edges``.

    ``component 3@5`` stands for the members of component 3 at position 5; embeddings, logits and subcomponents that are in no
    component have their labels. Edges within a component at one position are left out.

    Args:
        graph: of a prompt.
        clustering: of the same decomposition.

    Returns:
        One row per pair, the largest weight first; ``edges`` is how many were summed.

    Raises:
        TypeError: an argument is of another type.
    """
    instance("graph", graph, AttributionGraph)
    instance("clustering", clustering, Clustering)
    number = {str(member): component.index for component in clustering for member in component.members}
    names = list(graph.labels)
    for i in graph.is_subcomponent.nonzero().flatten().tolist():
        address, _, pos = names[i].rpartition("@")
        if address in number:
            names[i] = f"component {number[address]}@{pos}"
    edges = pd.DataFrame(
        {
            "source": [names[i] for i in graph.source.tolist()],
            "target": [names[i] for i in graph.target.tolist()],
            "weight": graph.weight.tolist(),
        }
    )
    edges = edges[edges.source != edges.target]
    summed = edges.groupby(["source", "target"], sort=False).weight.agg(weight="sum", edges="size").reset_index()
    order = summed.weight.abs().sort_values(ascending=False, kind="stable").index
    return summed.loc[order].reset_index(drop=True)
