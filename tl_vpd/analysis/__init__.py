"""What a decomposition says about its model: where subcomponents fire, and which ones to look at."""

from tl_vpd.analysis.audit import CircuitAudit, Repair, audit_circuit, repair_circuit
from tl_vpd.analysis.effects import ablation_table
from tl_vpd.analysis.graph import AttributionGraph, DatasetGraph, attribution_graph, dataset_graph
from tl_vpd.analysis.harvest import harvest
from tl_vpd.analysis.nodes import Node
from tl_vpd.analysis.pick import pick
from tl_vpd.analysis.pruning import PruneConfig, PrunedCircuit, PruneSweep, ablate_nodes, prune, prune_sweep
from tl_vpd.analysis.records import Harvest, SubcomponentHarvest, Window

__all__ = [
    "AttributionGraph",
    "CircuitAudit",
    "DatasetGraph",
    "Harvest",
    "Node",
    "PruneConfig",
    "PruneSweep",
    "PrunedCircuit",
    "Repair",
    "SubcomponentHarvest",
    "Window",
    "ablate_nodes",
    "ablation_table",
    "attribution_graph",
    "audit_circuit",
    "dataset_graph",
    "harvest",
    "pick",
    "prune",
    "prune_sweep",
    "repair_circuit",
]
