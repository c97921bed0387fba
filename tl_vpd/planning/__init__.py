"""What a run will cost: memory and time, before anything is trained, and what fits on a machine."""

from tl_vpd.planning.first_try import first_try, yardstick
from tl_vpd.planning.footprint import Footprint, footprint
from tl_vpd.planning.machine import Machine
from tl_vpd.planning.report import plan_lines
from tl_vpd.planning.target import Target, TransformerShape
from tl_vpd.planning.timing import seconds_per_step

__all__ = [
    "Footprint",
    "Machine",
    "Target",
    "TransformerShape",
    "first_try",
    "footprint",
    "plan_lines",
    "seconds_per_step",
    "yardstick",
]
