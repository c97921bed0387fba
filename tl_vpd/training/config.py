"""The configs of a run: what is learned (``VPDConfig``), how it runs (``ExecutionConfig``), what is written (``SavingConfig``).

Defaults of what is learned are the VPD paper's (section 3, losses and training), with learning rates and a length for models and
budgets far below its 400,000 steps. Unknown names are refused.

>>> config = VPDConfig(steps=2_000, C=128, optimizer=OptimizerConfig(lr=1e-3))
>>> config.minimality.p, config.coefficients.importance
(((0.0, 2.0), (1.0, 0.4)), 0.0002)
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from tl_vpd.checks import LARGEST_SEED
from tl_vpd.frozen import Frozen
from tl_vpd.importance import GammaConfig
from tl_vpd.importance.squash import Squash
from tl_vpd.site import Site, by_pattern
from tl_vpd.training.config_sections import (
    AdversaryConfig,
    Coefficients,
    FaithfulnessConfig,
    MinimalityConfig,
    OptimizerConfig,
)
from tl_vpd.training.knots import Knots

Precision = Literal["float32", "bfloat16"]
ShardingKind = Literal["none", "optimizer", "full"]


class VPDConfig(Frozen):
    """What is learned."""

    steps: int = Field(20_000, ge=1)
    """Updates of V, U and Γ."""
    batch_size: int = Field(32, ge=1)
    """Rows per step, over all processes."""
    seed: int = Field(0, ge=-(1 << 63), le=LARGEST_SEED)
    """Of the initialisation, the order of the data and all random numbers."""
    sites: tuple[str, ...] | None = Field(None, min_length=1)
    """Patterns of the sites to decompose (None: all)."""
    C: int | dict[str, int] | None = None
    """Subcomponents per site: one number, numbers by pattern (the more specific pattern wins, ``tl_vpd.site.by_pattern``), or
    None for the paper's proportions (``default_count``)."""
    tied: tuple[tuple[str, str], ...] = ()
    """Pairs of sites whose weights are each other's transposes, one matrix used twice: the second site's subcomponents are the
    first's, transposed (``tl_vpd.training.ties``)."""
    init: Literal["normal", "channels"] = "normal"
    """Where V and U start: random directions, or the weight's neurons and head channels."""
    init_scale: float = Field(1.0, gt=0)
    """Factor of V and U at the start. Well below 1 (and without a warm-up), those directions grow that the outputs need first,
    and fewer subcomponents serve several features."""
    gamma: GammaConfig = GammaConfig()
    """The causal-importance function Γ (VPD paper, section 2)."""
    coefficients: Coefficients = Coefficients()
    stochastic_routing: Literal["all", "uniform_k"] = "uniform_k"
    """Which sites stochastic masks act on at each token: all, or k random ones (VPD paper, section 3: subset routing)."""
    merged: float = Field(0.0, ge=0, lt=1)
    """One masked forward per step instead of two, with adversarial masks on this proportion of the rows and stochastic ones on
    the others (0: two forwards, as in the paper; the newer recipe: 0.9)."""
    adversary: AdversaryConfig = AdversaryConfig()
    minimality: MinimalityConfig = MinimalityConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    faithfulness: FaithfulnessConfig = FaithfulnessConfig()
    locality: Knots = ((0.0, 8.0), (1.0, 0.25))
    """The width t of the locality loss over the run: a head or neuron counts where it has more than about t/N of a subcomponent's
    squared norm, N their number."""
    output: Literal["kl", "mse"] = "kl"
    """Distance between outputs: KL for logits, squared error for others; for custom models it must be said which."""

    @property
    def squash(self) -> Squash:
        """How pre-sigmoid values become the importances that make masks."""
        return Squash()

    @field_validator("sites", mode="before")
    @classmethod
    def _one_pattern(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _positive_counts(self) -> VPDConfig:
        counts = {"every site": self.C} if isinstance(self.C, int) else self.C or {}
        for where, count in counts.items():
            if count < 1:
                raise ValueError(f"C of {where} is {count}; a site needs at least one subcomponent.")
        return self

    @model_validator(mode="after")
    def _used(self) -> VPDConfig:
        if not self.coefficients.locality:
            self.refuse_unused(("locality",), "coefficients.locality is 0.")
        if any(width == 0 for _, width in self.locality):
            raise ValueError(f"locality={self.locality!r}: its values must be above 0.")
        if self.merged and self.adversary.start:
            raise ValueError(
                f"adversary.start={self.adversary.start} cannot be combined with merged={self.merged}, whose rows are attacked "
                "from the first step: set either to 0."
            )
        return self


class ExecutionConfig(Frozen):
    """How a run is carried out; except for ``precision``, results are the same to rounding."""

    micro_batch: int | None = Field(None, ge=1)
    """Rows run at once, to save memory (None: all of a process's rows)."""
    sharding: ShardingKind = "none"
    """What each process of a run under ``torchrun`` stores a part of instead of the whole: ``none``, the ``optimizer``'s moments,
    or V, U, Γ, gradients and moments (``full``)."""
    precision: Precision = "float32"
    """Of matrix products: ``float32``, or ``bfloat16`` by autocast. What is learned stays in the decomposition's dtype."""
    checkpoint: bool = False
    """Compute a layer's activations again in backward instead of keeping them, to save memory."""
    blocked_logits: bool | None = None
    """Make logits for a few tokens at a time, in each loss, to save memory (None: where those of the rows run at once would take
    more than 128 MiB)."""
    compile: bool | str = False
    """Run the step's passes as compiled graphs (``tl_vpd.training.engine.compiled``): faster, after some minutes of compilation;
    needs a C++ compiler, or Triton on a GPU. A name: a backend of ``torch.compile``, or ``recorded`` for graphs that need no
    compiler."""

    @model_validator(mode="after")
    def _together(self) -> ExecutionConfig:
        if self.compile and (self.checkpoint or self.sharding != "none"):
            raise ValueError("compile=True cannot be combined with checkpoint=True or with sharding: choose one.")
        return self


class SavingConfig(Frozen):
    """What a run writes."""

    folder: Path | None = None
    """For metrics, states and the result (None: nothing is written)."""
    save_every: int = Field(500, ge=1)
    """Steps between states."""
    keep_states: int = Field(2, ge=1)
    """The newest states that stay on the disk."""
    log_every: int = Field(10, ge=1)
    """Steps between rows of metrics."""

    @field_validator("folder", mode="before")
    @classmethod
    def _path(cls, value: object) -> object:
        return Path(value).expanduser() if isinstance(value, str | PathLike) else value

    @model_validator(mode="after")
    def _used(self) -> SavingConfig:
        if self.folder is None:
            self.refuse_unused(("save_every", "keep_states"), "without folder nothing is written.")
        return self


def counts_for(config: VPDConfig, sites: Mapping[str, Site]) -> dict[str, int]:
    """C of every site.

    Raises:
        KeyError: a pattern matches no site, or no pattern matches a site.
        ValueError: two equally specific patterns give a site different numbers.
    """
    if isinstance(config.C, int):
        return dict.fromkeys(sites, config.C)
    if config.C is None:
        return {name: default_count(site) for name, site in sites.items()}
    return by_pattern(config.C, list(sites), what="C")


def default_count(site: Site) -> int:
    """The paper's proportions: Q and K two thirds of the matrix's larger dimension, V and O four thirds, MLP in once, out 7/6."""
    ratio = {"q": 2 / 3, "k": 2 / 3, "v": 4 / 3, "o": 4 / 3, "out": 7 / 6}.get(site.short, 1.0)
    return max(1, round(ratio * max(site.d_in, site.d_out)))
