"""Sources become masks: ``m = g + (1 − g) · r`` for subcomponents, the source itself for Δ; and who chooses the sources."""

from tl_vpd.masking.fresh import AttackResult, attacked_masks, fresh_pgd, restarted_pgd
from tl_vpd.masking.masks import Masks, SiteMask, constant_masks, masks_from_sources
from tl_vpd.masking.persistent import PersistentSources, rows_of_slots

__all__ = [
    "AttackResult",
    "Masks",
    "PersistentSources",
    "SiteMask",
    "attacked_masks",
    "constant_masks",
    "fresh_pgd",
    "masks_from_sources",
    "restarted_pgd",
    "rows_of_slots",
]
