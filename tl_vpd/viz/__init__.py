"""Pictures for notebooks and for self-contained pages; nothing here ever needs the network.

>>> records = harvest(vpd, model, tokens)                                 # doctest: +SKIP
>>> viz.subcomponent(records, "blocks.1.mlp.W_in:12")                     # doctest: +SKIP
>>> viz.page([viz.losses(run.history), viz.subcomponent(records, "blocks.1.mlp.W_in:12")], "My run", "run.html")
...                                                                       # doctest: +SKIP
"""

from tl_vpd.viz.attention import attention_by_offset, head_norms, pair_attention, static_strengths
from tl_vpd.viz.attention_tokens import importances
from tl_vpd.viz.comparison import comparison_page, comparison_panels
from tl_vpd.viz.dashboard import DashboardConfig, DashboardData, dashboard
from tl_vpd.viz.editing import edit_page, edit_panels
from tl_vpd.viz.evaluation import evaluation_page
from tl_vpd.viz.graphs import graph
from tl_vpd.viz.panel import Panel, page
from tl_vpd.viz.plots import losses
from tl_vpd.viz.subcomponents import subcomponent
from tl_vpd.viz.tables import table

__all__ = [
    "DashboardConfig",
    "DashboardData",
    "Panel",
    "attention_by_offset",
    "comparison_page",
    "comparison_panels",
    "dashboard",
    "edit_page",
    "edit_panels",
    "evaluation_page",
    "graph",
    "head_norms",
    "importances",
    "losses",
    "page",
    "pair_attention",
    "static_strengths",
    "subcomponent",
    "table",
]
