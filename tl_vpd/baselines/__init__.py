"""What VPD is compared with: SPD as a configuration, APD, transcoders; and the comparison itself."""

from tl_vpd.baselines.apd import APDConfig, apd
from tl_vpd.baselines.comparison import Comparison, ComparisonConfig, TrainingCost, compare
from tl_vpd.baselines.methods import METHODS
from tl_vpd.baselines.rank_one import RankOne, vpd
from tl_vpd.baselines.spd import SlopedSquash, SPDConfig, spd, spd_config
from tl_vpd.baselines.transcoders import (
    ReplacedModel,
    Transcoder,
    TranscoderConfig,
    Transcoders,
    calibrate,
    train_transcoders,
    transcoder_consistency,
)

__all__ = [
    "METHODS",
    "APDConfig",
    "Comparison",
    "ComparisonConfig",
    "RankOne",
    "ReplacedModel",
    "SPDConfig",
    "SlopedSquash",
    "TrainingCost",
    "Transcoder",
    "TranscoderConfig",
    "Transcoders",
    "apd",
    "calibrate",
    "compare",
    "spd",
    "spd_config",
    "train_transcoders",
    "transcoder_consistency",
    "vpd",
]
