"""What a decomposition says about its model: where subcomponents fire, and which ones to look at."""

from tl_vpd.analysis.harvest import Harvest, SubcomponentHarvest, Window, harvest, pick

__all__ = ["Harvest", "SubcomponentHarvest", "Window", "harvest", "pick"]
