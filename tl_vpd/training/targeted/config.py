"""What a targeted run learns: a ``VPDConfig`` with the losses of two streams (arXiv 2607.13047).

Defaults are those of the paper for a few prompts; a language or a topic needs a larger C, and a shared transformer as Γ.

>>> config = TargetedConfig(steps=5_000, coefficients={"importance": 1e-3})
>>> config.C, config.coefficients.nontarget, config.adversary.start
(64, 1.0, 0.2)
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tl_vpd.importance import GammaConfig
from tl_vpd.training.config import VPDConfig
from tl_vpd.training.config_sections import AdversaryConfig, Coefficients, FaithfulnessConfig, MinimalityConfig
from tl_vpd.training.knots import Knots

Scheduled = Literal[
    "stochastic", "adversarial", "layerwise", "importance", "frequency", "locality", "unmasked", "nontarget"
]


def _up_and_down() -> dict[Scheduled, Knots]:
    """The importance coefficient up from 0 over the first 15% of the run, then down to a quarter."""
    return {"importance": ((0.0, 0.0), (0.15, 1.0), (1.0, 0.25))}


class TargetedCoefficients(Coefficients):
    """Weights of the losses; those that a plain run has too are of the target stream."""

    delta: float = Field(0.0, ge=0)
    """Always 0: Δ is what the target does not use, and has no loss."""
    stochastic: float = Field(1.0, ge=0)
    """Stochastic reconstruction of the target stream."""
    importance: float = Field(4e-3, ge=0)
    """Importance minimality, the first to tune."""
    frequency: float = Field(0.0, ge=0)
    """Frequency minimality, on the target stream alone."""
    unmasked: float = Field(0.2, ge=0)
    """Reconstruction of the target stream with all masks 1 and Δ at 0, so that unimportant subcomponents do not disturb (0: no
    such pass)."""
    nontarget: float = Field(1.0, ge=0)
    """Stochastic reconstruction of the non-target stream, where Δ's masks are 1."""
    nontarget_importance: float = Field(2.0, ge=0)
    """Importance minimality of the non-target stream, as a multiple of ``importance``."""
    schedule: dict[Scheduled, Knots] = Field(default_factory=_up_and_down)  # type: ignore[assignment]
    """Factors of these weights over the run, by name; ``importance`` is that of both streams."""

    def off_target(self) -> TargetedCoefficients:
        """The weights of the non-target stream's losses, under the names that they have in a plain run."""
        none = dict.fromkeys(("adversarial", "layerwise", "frequency", "locality", "unmasked"), 0.0)
        importance = self.nontarget_importance * self.importance
        return self.model_copy(update={**none, "stochastic": self.nontarget, "importance": importance})


class TargetedAdversary(AdversaryConfig):
    """The adversary, which attacks the target stream."""

    start: float = Field(0.2, ge=0, lt=1)
    """Fraction of the run before which there is no adversarial loss and no ascent (the paper: 0.2, for prompts in a model of 4
    blocks 0.8)."""


class TargetedMinimality(MinimalityConfig):
    """How importances are counted."""

    p: Knots = ((0.0, 2.0), (1.0, 1.0))
    """Exponent of ``power`` over the run (the paper, for a language: ``((0.1, 2), (1, 0.4))``)."""


class TargetedConfig(VPDConfig):
    """What is learned from a target and a non-target stream; there is no faithfulness loss and no warm-up."""

    steps: int = Field(30_000, ge=1)
    """Updates of V, U and Γ."""
    batch_size: int = Field(64, ge=1)
    """Rows of the target stream per step, over all processes."""
    nontarget_batch_size: int | None = Field(None, ge=1)
    """Those of the non-target stream (None: as many)."""
    C: int | dict[str, int] | None = 64
    """Subcomponents per site (the paper: 64 to 96 for prompts, about half of ``d_model`` for a language)."""
    init: Literal["normal", "channels", "target"] = "normal"  # type: ignore[assignment]
    """Where V and U start: as in a plain run, or at what the weights do to the target's tokens
    (``tl_vpd.training.targeted.start``), for runs of hundreds or few thousands of steps."""
    gamma: GammaConfig = GammaConfig(kind="global_mlp")
    """The causal-importance function Γ (the paper: for a language, a shared transformer of width 1024 and 2 blocks)."""
    coefficients: TargetedCoefficients = TargetedCoefficients()
    adversary: TargetedAdversary = TargetedAdversary()
    minimality: TargetedMinimality = TargetedMinimality()
    faithfulness: FaithfulnessConfig = FaithfulnessConfig(warm_up_steps=0)
    """Not used."""
    decay: float = Field(0.1, ge=0)
    """Decay of subcomponents that are not important: after each update V's column and U's row are multiplied by
    ``1 − lr · decay · (1 − g)``, g the subcomponent's largest importance in both batches (0: none)."""

    @model_validator(mode="after")
    def _without_faithfulness(self) -> TargetedConfig:
        if self.coefficients.delta or self.faithfulness != FaithfulnessConfig(warm_up_steps=0):
            raise ValueError(
                "a targeted run has no faithfulness loss and no warm-up, since Δ is what the target does not use: leave "
                "coefficients.delta and faithfulness out."
            )
        if self.init == "target":
            self.refuse_unused(("init_scale",), "init='target' sets V and U.")
        if self.tied:
            raise ValueError("tied sites are not decayed together: leave tied out of a targeted run.")
        return self

    @property
    def nontarget_rows(self) -> int:
        """Rows of the non-target stream per step."""
        return self.nontarget_batch_size or self.batch_size

    def off_target(self) -> TargetedConfig:
        """The config of the non-target stream: no adversary, no frequencies, one pass."""
        minimality = self.minimality.model_copy(update={"frequency_reference": None, "frequency_half_life": None})
        return self.model_copy(update={"merged": 0.0, "minimality": minimality})
