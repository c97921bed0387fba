"""tl_vpd: adVersarial Parameter Decomposition for TransformerLens."""

from tl_vpd.decomposition import Decomposition

__all__ = ["Decomposition"]
