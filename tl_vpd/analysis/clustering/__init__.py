"""Components: groups of subcomponents that are important at the same tokens, by description length.

>>> clustering = cluster(vpd, model, tokens)                     # doctest: +SKIP
>>> clustering[0].members                                        # doctest: +SKIP
"""

from tl_vpd.analysis.clustering.cluster import (
    ClusterConfig,
    ClusterEnsemble,
    cluster,
    cluster_ensemble,
    variation_of_information,
)
from tl_vpd.analysis.clustering.clustering import Clustering, Component
from tl_vpd.analysis.clustering.graphs import component_edges
from tl_vpd.analysis.clustering.merging import MergeHistory
from tl_vpd.analysis.clustering.patterns import Patterns, importance_patterns

__all__ = [
    "ClusterConfig",
    "ClusterEnsemble",
    "Clustering",
    "Component",
    "MergeHistory",
    "Patterns",
    "cluster",
    "cluster_ensemble",
    "component_edges",
    "importance_patterns",
    "variation_of_information",
]
