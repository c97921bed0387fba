"""What VPD is compared with: SPD as a configuration, APD with a separate trainer, and one interface for all three."""

from tl_vpd.baselines.apd import APDConfig, apd
from tl_vpd.baselines.methods import METHODS
from tl_vpd.baselines.rank_one import RankOne, vpd
from tl_vpd.baselines.spd import SlopedSquash, SPDConfig, spd, spd_config

__all__ = [
    "METHODS",
    "APDConfig",
    "RankOne",
    "SPDConfig",
    "SlopedSquash",
    "apd",
    "spd",
    "spd_config",
    "vpd",
]
