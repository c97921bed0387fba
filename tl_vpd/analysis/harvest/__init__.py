"""Harvest: where each subcomponent fires on any number of tokens, as statistics, windows of text, token tables and neighbours.

>>> harvested = harvest(vpd, model, tokens)                     # doctest: +SKIP
>>> harvested["blocks.1.mlp.W_in:12"].input_tokens(by="pmi")    # doctest: +SKIP
>>> pick(harvested, 12)                                         # doctest: +SKIP
"""

from tl_vpd.analysis.harvest.columns import Column, Columns
from tl_vpd.analysis.harvest.config import HarvestConfig
from tl_vpd.analysis.harvest.logits import LogitEffects, logit_effects
from tl_vpd.analysis.harvest.merging import merge
from tl_vpd.analysis.harvest.pick import pick
from tl_vpd.analysis.harvest.records import SubcomponentHarvest
from tl_vpd.analysis.harvest.result import Harvest
from tl_vpd.analysis.harvest.rows import check_are_tokens
from tl_vpd.analysis.harvest.run import harvest
from tl_vpd.analysis.harvest.tokens import TokenCounts, token_texts
from tl_vpd.analysis.harvest.windows import Window, Windows

__all__ = [
    "Column",
    "Columns",
    "Harvest",
    "HarvestConfig",
    "LogitEffects",
    "SubcomponentHarvest",
    "TokenCounts",
    "Window",
    "Windows",
    "check_are_tokens",
    "harvest",
    "logit_effects",
    "merge",
    "pick",
    "token_texts",
]
