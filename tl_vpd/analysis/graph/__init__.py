"""Attribution graphs: how subcomponents of one prompt, or of many, pass information on to each other and to the logits."""

from tl_vpd.analysis.graph.attribution import attribution_graph
from tl_vpd.analysis.graph.config import DatasetGraphConfig, GraphConfig
from tl_vpd.analysis.graph.dataset import DatasetGraph, dataset_graph
from tl_vpd.analysis.graph.result import AttributionGraph
from tl_vpd.analysis.graph.targets import LogitTarget

__all__ = [
    "AttributionGraph",
    "DatasetGraph",
    "DatasetGraphConfig",
    "GraphConfig",
    "LogitTarget",
    "attribution_graph",
    "dataset_graph",
]
