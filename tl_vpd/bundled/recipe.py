"""The config that the bundled decomposition was trained with."""

from __future__ import annotations

from tl_vpd.importance import GammaConfig
from tl_vpd.training import AdversaryConfig, Coefficients, MinimalityConfig, OptimizerConfig, VPDConfig

CONFIG = VPDConfig(
    steps=10_000,
    batch_size=8,
    seed=0,
    C={"*.W_[QK]": 128, "*.W_[VO]": 160, "*.W_in": 512, "*.W_out": 512},
    init="channels",
    gamma=GammaConfig(d_ci=192, n_blocks=2, n_heads=4, output_bias=0.8),
    coefficients=Coefficients(
        delta=1e5,
        importance=5.3e-4,
        frequency=2.65e-4,
        schedule={"importance": ((0, 0), (0.3, 1)), "frequency": ((0, 0), (0.3, 1))},
    ),
    adversary=AdversaryConfig(lr=0.02, inner_steps=1, betas=(0.01, 0.99)),
    minimality=MinimalityConfig(kind="smooth_l0", normalised=True),
    optimizer=OptimizerConfig(lr=1e-3, gamma_clip=1.0),
)
