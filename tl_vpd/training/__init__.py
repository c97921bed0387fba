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
from tl_vpd.training.new_decomposition import new_decomposition
from tl_vpd.training.run import Run, decompose
from tl_vpd.training.trainer import StepMetrics, Trainer

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
    "Trainer",
    "VPDConfig",
    "decompose",
    "new_decomposition",
]
