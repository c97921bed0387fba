"""Stochastic Parameter Decomposition (SPD; arXiv 2506.20790), the method before VPD, as a configuration of the same trainer.

Stochastic masks on all sites and layerwise, one small MLP per subcomponent for Γ, no adversary, and a squashing that may continue
below 0 with a slope s:

    g = clamp(z, 0, 1) + s min(z, 0)          s = 0.01 in SPD's code: masks may then be negative; the default is 0

Difference from the paper: Δ is masked too.

>>> spd_config(C=20, steps=100).coefficients.layerwise
1.0
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from tl_vpd.baselines.rank_one import RankOne, vpd
from tl_vpd.checks import config_of, number
from tl_vpd.importance import GammaConfig
from tl_vpd.importance.squash import Squash
from tl_vpd.training import Coefficients, FaithfulnessConfig, VPDConfig
from tl_vpd.training.data import Batches


class SPDConfig(VPDConfig):
    """What SPD learns: a ``VPDConfig`` with the slope of its squashing."""

    forward_slope: float = Field(0.0, ge=0, le=1)
    """Slope of importances below 0."""

    @property
    def squash(self) -> Squash:
        """How pre-sigmoid values become the importances that make masks."""
        return SlopedSquash(self.forward_slope) if self.forward_slope else Squash()


class SlopedSquash(Squash):
    """A squashing that continues below 0 with a slope, where the gradient passes whatever its sign."""

    def __init__(self, slope: float) -> None:
        self.slope = number("slope", slope, minimum=0, maximum=1)

    def importances(self, z: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """``clamp(z, 0, 1) + slope · min(z, 0)``, as constants."""
        return z.clamp(0, 1).add_(z.clamp(max=0), alpha=self.slope)

    def pullback(
        self, z: Float[Tensor, "*batch"], grad: Float[Tensor, "*batch"], out: Float[Tensor, "*batch"] | None = None
    ) -> Float[Tensor, "*batch"]:
        """The gradient in z from the gradient in g (``out`` may be ``grad``)."""
        return torch.where(z > 0, grad, grad * self.slope, out=out).masked_fill_(z > 1, 0)


def spd(
    model: nn.Module,
    data: Batches,
    config: SPDConfig,
    *,
    folder: Path | None = None,
    progress: bool = False,
    compile: bool = False,
) -> RankOne:
    """Decomposes a model by SPD (``tl_vpd.baselines.methods`` documents the arguments).

    Raises:
        ValueError: the config has an adversary.
        TypeError: the config is another one.
    """
    config = config_of(SPDConfig, config)
    if config.coefficients.adversarial:
        raise ValueError("SPD has no adversary: set coefficients.adversarial to 0, or choose vpd.")
    return vpd(model, data, config, folder=folder, progress=progress, compile=compile)


def spd_config(**settings: Any) -> SPDConfig:
    """SPD's recipe for toys of superposition; ``settings`` replace fields, those of sections one by one."""
    base = SPDConfig(
        steps=40_000,
        gamma=GammaConfig(kind="per_subcomponent_mlps", hidden=16),
        coefficients=Coefficients(
            delta=1.0, stochastic=1.0, layerwise=1.0, adversarial=0.0, importance=3e-3, frequency=0.0
        ),
        stochastic_routing="all",
        faithfulness=FaithfulnessConfig(warm_up_steps=0),
        output="mse",
    )
    sections = {
        "minimality": {"p": 1.0, **dict(settings.pop("minimality", {}))},
        "optimizer": {"lr": 1e-3, "lr_final": 0.0, "clip": None, **dict(settings.pop("optimizer", {}))},
    }
    return SPDConfig(**{**dict(base), **sections, **settings})
