"""What a decomposition is trained with: the algorithm (``VPDConfig``), apart from where and how it runs.

Defaults are the paper's, with learning rates and run length for models and budgets far below its 400,000 steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from tl_vpd.importance import GammaConfig
from tl_vpd.site import Site, by_pattern


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class AdversaryConfig(_Frozen):
    """The persistent adversary of training."""

    inner_steps: int = Field(2, ge=0)
    """Ascent updates before the main forward, whose own gradient gives one more."""
    lr: float = Field(0.01, gt=0)
    """Adam's rate, constant after the warm-up."""
    warm_up: float = Field(0.025, ge=0, le=1)
    """Share of the run over which the rate rises from 0."""
    betas: tuple[float, float] = (0.5, 0.99)
    eps: float = Field(1e-8, gt=0)
    routing: Literal["all", "uniform_k"] = "all"
    """Which sites its masks act on at a token."""
    pool: int | None = Field(None, ge=1)
    """Sources a batch element, of which every position takes one at random at each step (None: one for every position): memory
    ``batch × pool × C`` instead of ``batch × pos × C``."""


class Coefficients(_Frozen):
    """Weights of the losses (the paper's)."""

    delta: float = Field(1e7, ge=0)
    """Δ-L2, also called faithfulness (about 1e3 where ``faithfulness`` is ``relative``)."""
    stochastic: float = Field(0.5, ge=0)
    adversarial: float = Field(0.5, ge=0)
    layerwise: float = Field(0.0, ge=0)
    """Stochastic masks on one site at a time, averaged over sites: one more pass a site and step (SPD's recipe has it at 1)."""
    importance: float = Field(2e-4, ge=0)
    """The first to tune: too high and importances sink below 1 everywhere, too low and L0 stays dense."""
    frequency: float = Field(1e-4, ge=0)
    """About half of ``importance``."""


class VPDConfig(_Frozen):
    """The algorithm's settings; unknown names are refused."""

    steps: int = Field(20_000, ge=1)
    batch_size: int = Field(32, ge=1)
    seed: int = 0
    sites: tuple[str, ...] | None = Field(None, min_length=1)
    """Patterns of the sites to decompose (None: all)."""
    C: int | dict[str, int] | None = None
    """Subcomponents a site: one number, numbers by pattern, or None for the paper's proportions (``default_counts``)."""
    tied: tuple[tuple[str, str], ...] = ()
    """Pairs of sites whose weights are each other's transposes, one matrix used twice: the second site's subcomponents are the
    first's, turned round (``tl_vpd.training.ties``)."""
    init: Literal["normal", "channels"] = "normal"
    """Where V and U start: random directions, or the weight's own neurons and head channels."""
    init_scale: float = Field(1.0, gt=0)
    """Factor of V and U at the start. Well below 1 (and without a warm-up), those directions grow that the outputs need first,
    and subcomponents share features less."""
    gamma: GammaConfig = GammaConfig()
    lr: float = Field(5e-4, gt=0)
    """AdamW's rate for V and U."""
    gamma_lr: float | None = Field(None, gt=0)
    """AdamW's rate for Γ (None: ``lr``)."""
    lr_final: float = Field(0.1, ge=0, le=1)
    """Both rates fall on a cosine to this share."""
    coefficients: Coefficients = Coefficients()
    p_start: float = Field(2.0, gt=0)
    p_end: float = Field(0.4, gt=0)
    """Exponent of the minimality losses, linear over the run."""
    minimality: Literal["power", "smooth_l0"] = "power"
    """How much an importance counts: ``(g + ε)^p``, or the newer recipe's ``g² / (g² + γ²)``."""
    smooth_start: float = Field(1.0, gt=0)
    smooth_end: float = Field(0.01, gt=0)
    """γ of ``smooth_l0``, linear over the first ``smooth_share`` of the run and then held."""
    smooth_share: float = Field(0.9, gt=0, le=1)
    frequency_reference: float | None = Field(None, gt=0)
    """The count a in ``f log2(1 + a f)`` (None: the batch's real tokens, the paper's term)."""
    frequency_half_life: float | None = Field(None, gt=0)
    """Half-life, in steps, of a running mean at which the frequency loss is taken (None: the batch's own frequency)."""
    forward_slope: float = Field(0.0, ge=0, le=1)
    """Slope, below 0, of the squashing that makes masks: 0, or SPD's 0.01, which lets masks be negative. To compare with SPD."""
    minimality_warm_up: float = Field(0.0, ge=0, le=1)
    """Share of the run over which the coefficients of importance and frequency rise from 0. With a Γ whose ``output_bias`` is
    near 1, training then starts where nothing is ablated and reconstruction is exact, and gives up the least needed first."""
    stochastic_routing: Literal["all", "uniform_k"] = "uniform_k"
    merged: bool = False
    """One masked forward a step instead of two: adversarial masks on every other row, stochastic ones on the rest."""
    adversary: AdversaryConfig = AdversaryConfig()
    faithfulness: Literal["total", "relative"] = "total"
    """Squared error over all decomposed weights, or each site's relative to its own norm."""
    clip: float | None = Field(0.01, gt=0)
    """Gradient norm of V and U together (Γ is not clipped; None: no clipping)."""
    warm_up_steps: int = Field(400, ge=0)
    """Steps of faithfulness alone, on V and U, before the first."""
    warm_up_lr: float = Field(1e-3, gt=0)
    output: Literal["kl", "mse"] = "kl"
    """Distance of outputs: KL for logits, squared error for others."""

    @field_validator("sites", mode="before")
    @classmethod
    def _one_pattern(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _positive_counts(self) -> VPDConfig:
        given = {"every site": self.C} if isinstance(self.C, int) else self.C or {}
        for where, count in given.items():
            if count < 1:
                raise ValueError(f"C of {where} is {count}; a site needs at least one subcomponent.")
        return self


def counts_for(config: VPDConfig, sites: Mapping[str, Site]) -> dict[str, int]:
    """C of every site.

    Raises:
        KeyError: a pattern matches no site, or a site is left without. ValueError: two patterns disagree.
    """
    if isinstance(config.C, int):
        return dict.fromkeys(sites, config.C)
    if config.C is None:
        return {name: default_count(site) for name, site in sites.items()}
    return by_pattern(config.C, list(sites), what="C")


def default_count(site: Site) -> int:
    """The paper's proportions: Q and K two thirds of the matrix's larger dimension, V and O four thirds, MLP in once, out 7/6."""
    share = {"q": 2 / 3, "k": 2 / 3, "v": 4 / 3, "o": 4 / 3, "out": 7 / 6}.get(site.short, 1.0)
    return max(1, round(share * max(site.d_in, site.d_out)))
