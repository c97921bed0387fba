"""Pruning to a behaviour: the few nodes of a prompt that keep it, under stochastic and adversarial masks of all others."""

from tl_vpd.analysis.pruning.circuit import PrunedCircuit, ablate_nodes
from tl_vpd.analysis.pruning.config import PruneConfig
from tl_vpd.analysis.pruning.prune import PruneSweep, prune, prune_sweep

__all__ = ["PruneConfig", "PruneSweep", "PrunedCircuit", "ablate_nodes", "prune", "prune_sweep"]
