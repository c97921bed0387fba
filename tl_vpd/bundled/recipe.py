"""The configs of the bundled decomposition: a run from channels, and a shorter one that goes on from its result, at a lower
learning rate and slightly lower coefficients of minimality."""

from __future__ import annotations

from tl_vpd.importance import GammaConfig
from tl_vpd.training import (
    AdversaryConfig,
    Coefficients,
    FaithfulnessConfig,
    MinimalityConfig,
    OptimizerConfig,
    VPDConfig,
)

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

SETTLING = VPDConfig(
    **CONFIG.model_dump(
        exclude_unset=True, exclude={"steps", "seed", "coefficients", "minimality", "optimizer", "faithfulness"}
    ),
    steps=2_000,
    seed=1,
    coefficients=Coefficients(delta=1e5, importance=4.8e-4, frequency=2.4e-4),
    minimality=MinimalityConfig(kind="smooth_l0", normalised=True, smooth=((0, 0.01),)),  # where CONFIG's ended
    optimizer=OptimizerConfig(lr=3e-4, gamma_clip=1.0),
    faithfulness=FaithfulnessConfig(warm_up_steps=0),
)
