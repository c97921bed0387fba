"""V, U and Δ: a weight matrix as a sum of rank-one subcomponents and what they leave over."""

from tl_vpd.components.components import Components
from tl_vpd.components.masked import masked_output

__all__ = ["Components", "masked_output"]
