"""What a decomposition says about its model: where subcomponents fire, what they do, and which ones a behaviour needs."""

from tl_vpd.analysis.audit import AuditConfig, CircuitAudit, Repair, RepairConfig, audit_circuit, repair_circuit
from tl_vpd.analysis.clustering import (
    ClusterConfig,
    ClusterEnsemble,
    Clustering,
    Component,
    Patterns,
    cluster,
    cluster_ensemble,
    component_edges,
    importance_patterns,
)
from tl_vpd.analysis.edge_attribution import EdgeAttributionConfig, EdgeScores, edge_attribution
from tl_vpd.analysis.edges import Edge
from tl_vpd.analysis.effects import AblationTableConfig, ablation_table
from tl_vpd.analysis.graph import (
    AttributionGraph,
    DatasetGraph,
    DatasetGraphConfig,
    GraphConfig,
    attribution_graph,
    dataset_graph,
)
from tl_vpd.analysis.harvest import (
    Column,
    Columns,
    Harvest,
    HarvestConfig,
    LogitEffects,
    SubcomponentHarvest,
    Window,
    harvest,
    logit_effects,
    merge,
    pick,
)
from tl_vpd.analysis.nodes import Node
from tl_vpd.analysis.pruning import PruneConfig, PrunedCircuit, PruneSweep, ablate_nodes, prune, prune_sweep

__all__ = [
    "AblationTableConfig",
    "AttributionGraph",
    "AuditConfig",
    "CircuitAudit",
    "ClusterConfig",
    "ClusterEnsemble",
    "Clustering",
    "Column",
    "Columns",
    "Component",
    "DatasetGraph",
    "DatasetGraphConfig",
    "Edge",
    "EdgeAttributionConfig",
    "EdgeScores",
    "GraphConfig",
    "Harvest",
    "HarvestConfig",
    "LogitEffects",
    "Node",
    "Patterns",
    "PruneConfig",
    "PruneSweep",
    "PrunedCircuit",
    "Repair",
    "RepairConfig",
    "SubcomponentHarvest",
    "Window",
    "ablate_nodes",
    "ablation_table",
    "attribution_graph",
    "audit_circuit",
    "cluster",
    "cluster_ensemble",
    "component_edges",
    "dataset_graph",
    "edge_attribution",
    "harvest",
    "importance_patterns",
    "logit_effects",
    "merge",
    "pick",
    "prune",
    "prune_sweep",
    "repair_circuit",
]
