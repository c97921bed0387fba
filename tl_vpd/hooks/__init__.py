"""Decomposed models in a researcher's hands: attach, modes, ablations, importances."""

from tl_vpd.hooks.ablations import ablation_hooks, delta_hooks, mask_hooks
from tl_vpd.hooks.acts import ComponentActs, component_acts
from tl_vpd.hooks.adversary import adversarial_masks
from tl_vpd.hooks.attached import Attached
from tl_vpd.hooks.importances import CausalImportances, causal_importances
from tl_vpd.hooks.modes import MODES
from tl_vpd.hooks.tapped import TappedModel

__all__ = [
    "MODES",
    "Attached",
    "CausalImportances",
    "ComponentActs",
    "TappedModel",
    "ablation_hooks",
    "adversarial_masks",
    "causal_importances",
    "component_acts",
    "delta_hooks",
    "mask_hooks",
]
