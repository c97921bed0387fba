"""A dashboard: a folder of pages that open from the disk, with every subcomponent of a harvest.

>>> viz.dashboard(vpd, model, harvested, "dashboard")             # doctest: +SKIP
"""

from tl_vpd.viz.dashboard.config import DashboardConfig
from tl_vpd.viz.dashboard.data import DashboardData
from tl_vpd.viz.dashboard.write import dashboard

__all__ = ["DashboardConfig", "DashboardData", "dashboard"]
