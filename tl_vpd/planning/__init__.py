"""What a run will cost: memory and matrix products, before anything is trained."""

from tl_vpd.planning.footprint import Footprint, footprint
from tl_vpd.planning.target import Target, TransformerShape

__all__ = ["Footprint", "Target", "TransformerShape", "footprint"]
