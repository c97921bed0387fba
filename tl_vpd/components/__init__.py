"""V, U and Δ: a weight matrix as a sum of rank-one subcomponents and the rest."""

from tl_vpd.components.components import Components
from tl_vpd.components.fingerprint import Fingerprint
from tl_vpd.components.layout import WHOLE, Layout

__all__ = ["WHOLE", "Components", "Fingerprint", "Layout"]
