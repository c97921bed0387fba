"""V, U and Δ: a weight matrix as a sum of rank-one subcomponents and what they leave over."""

from tl_vpd.components.components import Components
from tl_vpd.components.layout import WHOLE, Layout
from tl_vpd.components.masked import masked_output
from tl_vpd.components.opened import OpenPass
from tl_vpd.components.sourced import SourcedPass

__all__ = ["WHOLE", "Components", "Layout", "OpenPass", "SourcedPass", "masked_output"]
