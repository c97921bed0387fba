"""Targeted decomposition: only what chosen inputs use, with Δ for everything else (arXiv 2607.13047)."""

from tl_vpd.training.targeted.config import TargetedCoefficients, TargetedConfig
from tl_vpd.training.targeted.run import decompose_targeted
from tl_vpd.training.targeted.trainer import TargetedTrainer

__all__ = ["TargetedCoefficients", "TargetedConfig", "TargetedTrainer", "decompose_targeted"]
