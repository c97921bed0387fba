"""tl_vpd: adVersarial Parameter Decomposition for TransformerLens."""

from tl_vpd.decomposition import Decomposition
from tl_vpd.training import VPDConfig, decompose

__all__ = ["Decomposition", "VPDConfig", "decompose"]
