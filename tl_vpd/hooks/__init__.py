"""Decomposed models in a researcher's hands: attach, modes, ablations, importances."""

from tl_vpd.hooks.ablations import ablation_hooks, mask_hooks
from tl_vpd.hooks.attached import Attached
from tl_vpd.hooks.importances import CausalImportances, causal_importances
from tl_vpd.hooks.modes import MODES
from tl_vpd.hooks.tapped import TappedModel

__all__ = [
    "MODES",
    "Attached",
    "CausalImportances",
    "TappedModel",
    "ablation_hooks",
    "causal_importances",
    "mask_hooks",
]
