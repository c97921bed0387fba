"""What users get on a model: attached HookPoints, masked modes, ablations, importances."""

from tl_vpd.hooks.ablations import ablation_hooks, delta_hooks, mask_hooks
from tl_vpd.hooks.adversary import adversarial_masks
from tl_vpd.hooks.attached import Attached, attached_to, attachment_of
from tl_vpd.hooks.compact import compact, original_addresses
from tl_vpd.hooks.component_acts import ComponentActs, component_acts
from tl_vpd.hooks.importances import CausalImportances, causal_importances

__all__ = [
    "Attached",
    "CausalImportances",
    "ComponentActs",
    "ablation_hooks",
    "adversarial_masks",
    "attached_to",
    "attachment_of",
    "causal_importances",
    "compact",
    "component_acts",
    "delta_hooks",
    "mask_hooks",
    "original_addresses",
]
