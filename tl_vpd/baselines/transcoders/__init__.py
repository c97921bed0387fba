"""Transcoders: sparse replacements of MLPs, per-layer and cross-layer, with which decompositions are compared."""

from tl_vpd.baselines.transcoders.calibration import calibrate
from tl_vpd.baselines.transcoders.config import TranscoderConfig
from tl_vpd.baselines.transcoders.consistency import transcoder_consistency
from tl_vpd.baselines.transcoders.replaced_model import ReplacedModel
from tl_vpd.baselines.transcoders.training import train_transcoders
from tl_vpd.baselines.transcoders.transcoders import Transcoder, Transcoders

__all__ = [
    "ReplacedModel",
    "Transcoder",
    "TranscoderConfig",
    "Transcoders",
    "calibrate",
    "train_transcoders",
    "transcoder_consistency",
]
