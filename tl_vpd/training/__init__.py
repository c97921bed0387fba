"""Training a decomposition: config, losses, the step, runs that can be interrupted and resumed."""

from tl_vpd.training.config import AdversaryConfig, Coefficients, VPDConfig
from tl_vpd.training.run import Run, decompose, new_decomposition
from tl_vpd.training.trainer import StepMetrics, Trainer

__all__ = [
    "AdversaryConfig",
    "Coefficients",
    "Run",
    "StepMetrics",
    "Trainer",
    "VPDConfig",
    "decompose",
    "new_decomposition",
]
