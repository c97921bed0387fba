"""Artefacts of one model on the same axes."""

from tl_vpd.baselines.comparison.compare import compare
from tl_vpd.baselines.comparison.config import ComparisonConfig, TrainingCost
from tl_vpd.baselines.comparison.result import Comparison

__all__ = ["Comparison", "ComparisonConfig", "TrainingCost", "compare"]
