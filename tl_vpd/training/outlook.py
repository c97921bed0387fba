"""What a run may expect, and whether it is working, measured on a few rows of its first batch.

The *yardstick* ``D₀`` is what ablating the chosen sites costs: the distance between the target's output and that of the model
whose sites give their bias alone. A reconstruction loss means something beside it: at ``D₀`` subcomponents explain nothing. An
always-on subcomponent costs ``c_importance + c_frequency · log2(1 + a)`` and all of them together save at most ``D₀`` in each
reconstruction loss, so that at most

    (c_stochastic + c_adversarial) · D₀ / (c_importance + c_frequency · log2(1 + a))

of them pay for themselves (a: the reference count, or the batch's tokens; ``tl_vpd.losses.frequency_minimality``).

A run *collapses* when its important subcomponents explain nothing: the model under rounded masks (those of importance 0 ablated)
is as far from the target as with all sites ablated. No training loss shows it, since stochastic masks keep half of everything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from tl_vpd.forward.blocked import BlockedMasks
from tl_vpd.forward.mask_inputs import MaskInputs
from tl_vpd.forward.masked_model import MaskedModel
from tl_vpd.importance import DecomposedWeights
from tl_vpd.losses import Reconstruction
from tl_vpd.training.config import VPDConfig

ROWS, TOKENS = 8, 1024
"""Rows that yardstick and checks are measured on, and the tokens that these have at most."""
CHECKS = (0.01, 0.03, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
"""Fractions of a run at which it is checked."""
EARLY = 0.05
"""The fraction of a run before which nothing is warned of: importances have hardly moved."""
SHORTEST = 20
"""Steps of a run from which on it is checked."""
NOTHING = 0.8
"""The share of the yardstick above which important subcomponents explain nothing."""
LITTLE, SETTLED = 1 / 3, 0.2
"""The share of the yardstick above which they explain too little, from this fraction of the run on: it rarely falls while L0
does."""
DENSE = 0.5
"""The share of all subcomponents above which importances are dense, from half of the run on."""


@dataclass(frozen=True)
class Check:
    """A look at a run.

    Attributes:
        step: updates that were made before it.
        distance: between the target's output and that under rounded masks, per token.
        l0: important subcomponents per token.
        total: all subcomponents.
        yardstick: what ablating the sites costs, per token.
        progress: the fraction of the run that is done.
    """

    step: int
    distance: float
    l0: float
    total: int
    yardstick: float
    progress: float

    @property
    def share(self) -> float:
        """The distance as a share of the yardstick."""
        return self.distance / max(self.yardstick, 1e-12)

    def warning(self, config: VPDConfig) -> str | None:
        """What is wrong and what to change, in one sentence; None if nothing is."""
        c, share = config.coefficients, self.share
        if self.progress < EARLY:
            return None
        if share >= NOTHING:
            return (
                f"The important subcomponents ({self.l0:.1f} per token) explain nothing: with the others ablated the output is "
                f"{share:.0%} as far from the target's as with every site ablated. Lower coefficients.importance "
                f"({c.importance:g}) and coefficients.frequency ({c.frequency:g}), or train for longer."
            )
        dense = self.l0 >= DENSE * self.total
        if self.progress >= SETTLED and share >= LITTLE and not dense:
            return (
                f"Too little is explained: with only the important subcomponents ({self.l0:.1f} per token) the output is "
                f"{share:.0%} as far from the target's as with every site ablated, and this rarely falls while L0 does. Lower "
                f"coefficients.importance ({c.importance:g}) and coefficients.frequency ({c.frequency:g}), or train for longer."
            )
        if self.progress >= 0.5 and dense:
            return (
                f"Importances are dense: {self.l0:.1f} of {self.total} subcomponents are important per token. Raise "
                f"coefficients.importance ({c.importance:g}), or train for longer."
            )
        return None


class Outlook:
    """A run's yardstick, and checks against it.

    Args:
        masked_model: entered, of the decomposition and its target.
        config: of the run.
        tokens: a few rows (``rows_measured``).
        token_mask: False at padding (None: no padding).
    """

    def __init__(
        self,
        masked_model: MaskedModel,
        config: VPDConfig,
        tokens: Shaped[Tensor, "batch ..."],
        token_mask: Bool[Tensor, "batch pos"] | None = None,
    ) -> None:
        weights = masked_model.weights.weights
        assert isinstance(weights, DecomposedWeights)
        self.masked_model, self.weights, self.config = masked_model, weights, config
        self.tokens, self.token_mask = tokens, token_mask
        with torch.no_grad():
            self.target, inputs = masked_model.clean(self.tokens, self.token_mask)
            first = next(iter(inputs.values()))
            self.yardstick = self._distance(first.new_zeros(*first.shape[:-1], weights.site_axis.total))

    @property
    def unit(self) -> str:
        """Of distances."""
        return "nats" if self.config.output == "kl" else "of squared error"

    def affordable(self, tokens_per_batch: int) -> float:
        """How many always-on subcomponents can pay for themselves at the run's coefficients (infinite: they are free)."""
        c = self.config.coefficients
        count = self.config.minimality.frequency_reference or tokens_per_batch
        cost = c.importance + c.frequency * math.log2(1 + count)
        return (c.stochastic + c.adversarial) * self.yardstick / cost if cost else math.inf

    @torch.no_grad()
    def check(self, step: int) -> Check:
        """A look at the decomposition as it is now, after this many steps."""
        inputs = self.masked_model.inputs(self.tokens, self.token_mask)
        z = self.weights.pre_sigmoid(inputs, self.token_mask)
        important = (z > 0).sum(-1).float()
        l0 = important.mean() if self.token_mask is None else important[self.token_mask].mean()
        distance, progress = self._distance((z > 0).to(z.dtype)), step / self.config.steps
        return Check(step, distance, float(l0), z.shape[-1], self.yardstick, progress)

    def _distance(self, masks: Float[Tensor, "batch *pos C_total"]) -> float:
        """From the target's output to the model's under masks, with Δs ablated."""
        axis = self.weights.site_axis
        # As importances with sources of 0, which go through the sites' modules, where sharded matrices are gathered.
        rows = torch.zeros(masks[..., 0].numel(), dtype=torch.long, device=masks.device)
        sources = masks.new_zeros(1, axis.total + len(axis.names))
        output = self.masked_model.masked(
            self.tokens, BlockedMasks(masks, MaskInputs(sources, rows), axis), self.token_mask
        )
        return float(Reconstruction(self.target, self.config.output, self.token_mask)(output))


def rows_measured(rows: Shaped[Tensor, "batch ..."]) -> int:
    """How many of these rows yardstick and checks are measured on."""
    pos = rows.shape[1] if rows.ndim > 1 and not (rows.ndim == 2 and rows.is_floating_point()) else 1
    return max(1, min(ROWS, TOKENS // pos))


def due(done: int, steps: int) -> bool:
    """Whether a run is checked after ``done`` steps; one of a few steps is a trial, and is not."""
    return steps >= SHORTEST and done in {max(1, round(fraction * steps)) for fraction in CHECKS}


def duration(seconds: float) -> str:
    """A time in words.

    >>> duration(42.0), duration(170.0), duration(8_040.0), duration(1e6)
    ('42 s', '3 min', '2 h 14 min', '12 days')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds >= 3 * 86_400:
        return f"{seconds / 86_400:,.0f} days"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
