"""The sections of a ``VPDConfig``: adversary, coefficients, minimality, optimizer, faithfulness.

Defaults are the VPD paper's; what the authors' newer recipe changes is a choice, and is off.

>>> MinimalityConfig(p=((0.1, 2.0), (1.0, 0.4))).p         # 2 over the first tenth of the run, then down to 0.4
((0.1, 2.0), (1.0, 0.4))
>>> MinimalityConfig(p=1).p
((0.0, 1.0),)
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tl_vpd.frozen import Frozen
from tl_vpd.training.knots import Knots, at

Decay = Annotated[float, Field(ge=0, lt=1)]
"""The decay rate of a running mean."""
CoefficientName = Literal["delta", "stochastic", "adversarial", "layerwise", "importance", "frequency", "locality"]


class AdversaryConfig(Frozen):
    """The persistent adversary of training (VPD paper, section 3: adversarial reconstruction)."""

    inner_steps: int = Field(2, ge=0)
    """Ascent updates before the main forward, whose backward gives one more."""
    start: float = Field(0.0, ge=0, lt=1)
    """Fraction of the run before which there is no adversarial loss and no ascent."""
    lr: float = Field(0.01, gt=0)
    """Adam's learning rate, constant after the warm-up."""
    warm_up: float = Field(0.025, ge=0, le=1)
    """Fraction of the run over which, from ``start`` on, the learning rate rises from 0."""
    betas: tuple[Decay, Decay] = (0.5, 0.99)
    """Adam's decay rates of both moments (the newer recipe: 0.01, 0.99, with one ascent before the main forward)."""
    eps: float = Field(1e-8, gt=0)
    """Adam's ε."""
    routing: Literal["all", "uniform_k"] = "all"
    """Which sites its masks act on at each token: all of them, or a random subset."""
    pool: int | None = Field(None, ge=1)
    """Sources per batch element, of which every position uses one at random in each step (None: one for every position): memory
    ``batch × pool × C`` instead of ``batch × pos × C``."""


class Coefficients(Frozen):
    """Weights of the losses (VPD paper, section 3: the total loss)."""

    delta: float = Field(1e7, ge=0)
    """Faithfulness, the squared norm of Δ (about 1e3 where ``faithfulness.kind`` is ``relative``)."""
    stochastic: float = Field(0.5, ge=0)
    """Stochastic reconstruction."""
    adversarial: float = Field(0.5, ge=0)
    """Adversarial reconstruction."""
    layerwise: float = Field(0.0, ge=0)
    """Stochastic masks on one site at a time, averaged over sites (SPD paper; 1 there): one more pass per site and step."""
    importance: float = Field(2e-4, ge=0)
    """Importance minimality, the first to tune: too high and importances sink below 1 everywhere, too low and L0 stays dense."""
    frequency: float = Field(1e-4, ge=0)
    """Frequency minimality; about half of ``importance``."""
    locality: float = Field(0.0, ge=0)
    """Locality: a subcomponent writes to few heads or neurons (the newer recipe: 3e-5; ``tl_vpd.losses.locality``)."""
    schedule: dict[CoefficientName, Knots] = Field(default_factory=dict)
    """Factors of these weights over the run, by name. With ``((0, 0), (0.3, 1))`` for ``importance`` and ``frequency``, and a Γ
    whose ``output_bias`` is near 1, training starts where nothing is ablated and reconstruction is exact, and gives up the least
    needed first."""

    def at(self, step: int, steps: int) -> Coefficients:
        """The weights at a step, without a schedule."""
        now: dict[str, Any] = {"schedule": {}}
        for name, knots in self.schedule.items():
            now[name] = getattr(self, name) * at(knots, step, steps)
        return self.model_copy(update=now)


class MinimalityConfig(Frozen):
    """How importances are counted by both minimality losses (VPD paper, section 3: importance and frequency minimality)."""

    kind: Literal["power", "smooth_l0"] = "power"
    """How much an importance counts: ``(g + ε)^p``, or the newer recipe's ``g² / (g² + γ²)``."""
    p: Knots = ((0.0, 2.0), (1.0, 0.4))
    """Exponent of ``power`` over the run."""
    smooth: Knots = ((0.0, 1.0), (0.9, 0.01))
    """γ of ``smooth_l0`` over the run."""
    normalised: bool = False
    """Whether ``smooth_l0`` is divided by its value at g = 1: ``(1 + γ²) g² / (g² + γ²)`` (the newer recipe)."""
    frequency_reference: float | None = Field(None, gt=0)
    """The reference count a in ``f log2(1 + a f)`` (None: the batch's real tokens, the paper's term)."""
    frequency_half_life: float | None = Field(None, gt=0)
    """Half-life, in steps, of a running mean at which the frequency loss is evaluated (None: the batch's frequency)."""

    @model_validator(mode="after")
    def _used(self) -> MinimalityConfig:
        if self.kind == "power":
            self.refuse_unused(("smooth", "normalised"), "it belongs to kind='smooth_l0'.")
        else:
            self.refuse_unused(("p",), "it belongs to kind='power'.")
        for name in ("p", "smooth"):
            if any(value == 0 for _, value in getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)!r}: its values must be above 0.")
        return self


class OptimizerConfig(Frozen):
    """The optimizer of V, U and Γ, without weight decay (VPD paper, section 3: training)."""

    kind: Literal["adamw", "muon"] = "adamw"
    """AdamW for all, or, as in the newer recipe, Muon for V, U and Γ's matrices and AdamW for the rest of Γ. Muon's updates are
    scaled to the size of AdamW's, so that learning rates mean the same for both (``tl_vpd.training.optimizers``)."""
    lr: float = Field(5e-4, gt=0)
    """Learning rate of V and U."""
    gamma_lr: float | None = Field(None, gt=0)
    """Learning rate of Γ (None: ``lr``)."""
    lr_final: float = Field(0.1, ge=0, le=1)
    """Both learning rates fall on a cosine to this fraction."""
    lr_decay: float = Field(1.0, gt=0, le=1)
    """Fraction of the run over which they fall; afterwards they are constant."""
    lr_schedule: Knots = ((0.0, 1.0),)
    """Another factor of both learning rates over the run; ``((0, 0), (0.05, 1))`` is a warm-up."""
    momentum: Decay = 0.95
    """Muon's."""
    clip: float | None = Field(0.01, gt=0)
    """Largest gradient norm of V and U together (None: no clipping)."""
    gamma_clip: float | None = Field(None, gt=0)
    """Largest gradient norm of Γ (None: no clipping, as in the paper; the newer recipe clips)."""

    @model_validator(mode="after")
    def _used(self) -> OptimizerConfig:
        if self.kind == "adamw":
            self.refuse_unused(("momentum",), "it belongs to kind='muon'.")
        return self


class FaithfulnessConfig(Frozen):
    """The loss that holds ``V U`` to W (VPD paper, section 3: faithfulness)."""

    kind: Literal["total", "relative"] = "total"
    """Squared error over all decomposed weights, or the mean over sites of each one's error relative to its norm."""
    warm_up_steps: int = Field(400, ge=0)
    """Steps of faithfulness alone, on V and U, before the first step; unless set, at most as many as the run has."""
    warm_up_lr: float = Field(1e-3, gt=0)
    """AdamW's learning rate in those."""
