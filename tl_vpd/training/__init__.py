"""Training a decomposition: config, losses, the step, runs that can be interrupted and resumed."""

from tl_vpd.training.config import (
    AdversaryConfig,
    Coefficients,
    ExecutionConfig,
    FaithfulnessConfig,
    MinimalityConfig,
    OptimizerConfig,
    SavingConfig,
    VPDConfig,
)
from tl_vpd.training.metrics import StepMetrics
from tl_vpd.training.new_decomposition import new_decomposition
from tl_vpd.training.run import decompose
from tl_vpd.training.session import Run
from tl_vpd.training.targeted import TargetedCoefficients, TargetedConfig, TargetedTrainer, decompose_targeted
from tl_vpd.training.trainer import Trainer

__all__ = [
    "AdversaryConfig",
    "Coefficients",
    "ExecutionConfig",
    "FaithfulnessConfig",
    "MinimalityConfig",
    "OptimizerConfig",
    "Run",
    "SavingConfig",
    "StepMetrics",
    "TargetedCoefficients",
    "TargetedConfig",
    "TargetedTrainer",
    "Trainer",
    "VPDConfig",
    "decompose",
    "decompose_targeted",
    "new_decomposition",
]
