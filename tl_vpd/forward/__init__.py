"""The decomposed forward: one masked product, in three forms, and the model whose sites it replaces."""

from tl_vpd.forward.blocked import BlockedMasks
from tl_vpd.forward.cast_weights import CastWeights
from tl_vpd.forward.mask_inputs import MaskInputs
from tl_vpd.forward.masked_model import MaskedModel
from tl_vpd.forward.product import masked_output
from tl_vpd.forward.site_edit import SiteEdit
from tl_vpd.forward.site_product import PassMasks, SiteProduct
from tl_vpd.forward.site_taps import SiteFunction, SitePass, SiteTaps
from tl_vpd.forward.traceable import TraceableMasks

__all__ = [
    "BlockedMasks",
    "CastWeights",
    "MaskInputs",
    "MaskedModel",
    "PassMasks",
    "SiteEdit",
    "SiteFunction",
    "SitePass",
    "SiteProduct",
    "SiteTaps",
    "TraceableMasks",
    "masked_output",
]
