"""The config that the bundled decomposition was trained with."""

from __future__ import annotations

from tl_vpd.importance import GammaConfig
from tl_vpd.training import AdversaryConfig, Coefficients, OptimizerConfig, VPDConfig

CONFIG = VPDConfig(
    steps=7_000,
    batch_size=8,
    seed=0,
    C={"*.W_[QK]": 96, "*.W_[VO]": 128, "*.W_in": 416, "*.W_out": 416},
    init="channels",
    gamma=GammaConfig(d_ci=192, n_blocks=2, n_heads=4, causal=False, output_bias=0.8),
    coefficients=Coefficients(
        delta=1e5,
        importance=6e-4,
        frequency=3e-4,
        schedule={"importance": ((0, 0), (0.3, 1)), "frequency": ((0, 0), (0.3, 1))},
    ),
    adversary=AdversaryConfig(lr=0.02),
    optimizer=OptimizerConfig(lr=1e-3),
)
