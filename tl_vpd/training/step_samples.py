"""The random choices of a step for this process's rows: routing, slots of the pool, and sources.

>>> sampler = StepSampler(config, split, pos=64, site_axis=site_axis, device=device)      # doctest: +SKIP
>>> samples = sampler.at(step)                                                           # doctest: +SKIP
>>> sources = sampler.sources("stochastic", step, rows)                                  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_vpd.masking.routing import Routing, uniform_k, uniform_k_share
from tl_vpd.masking.row_random import RowRandom
from tl_vpd.site import ConcatenatedAxis
from tl_vpd.training.config import VPDConfig
from tl_vpd.training.micro_batch import BatchSplit

START = -1
"""The step of what is drawn before the first step."""


@dataclass(frozen=True)
class StepSamples:
    """A step's random choices except sources.

    Attributes:
        stochastic_routing: of the rows with stochastic masks (None: every site is masked at every token).
        adversarial_routing: of the attacked rows.
        slots: which slot of the pool each attacked token uses (None: there is no pool).
    """

    stochastic_routing: Routing | None
    adversarial_routing: Routing | None
    slots: Int[Tensor, "attacked pos"] | None = None


class StepSampler:
    """Draws a run's random numbers, step by step; each row's depend on seed, step and row alone.

    Args:
        config: of the run.
        split: this process's rows.
        pos: positions of a row.
        site_axis: of all subcomponents.
        device: where numbers are drawn.
        dtype: of sources, which are drawn in float32.
    """

    def __init__(
        self,
        config: VPDConfig,
        split: BatchSplit,
        *,
        pos: int,
        site_axis: ConcatenatedAxis,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config, self.split, self.pos, self.site_axis, self.dtype = config, split, pos, site_axis, dtype
        self.random = RowRandom(config.seed, torch.device(device))
        self.width = site_axis.total + len(site_axis.names)
        """Sources per token: one for each subcomponent and each Δ."""

    def of_length(self, pos: int) -> StepSampler:
        """The same for rows of another length, which get the first of the longest ones' numbers."""
        if pos == self.pos:
            return self
        shorter = copy(self)
        shorter.pos = pos
        return shorter

    def start(self) -> Float[Tensor, "attacked slots C_and_deltas"]:
        """The adversary's first sources."""
        slots = self.config.adversary.pool or self.pos
        return self.random.uniform("sources", START, self.split.attacked, (slots, self.width)).to(self.dtype)

    def at(self, step: int) -> StepSamples:
        """All of a step's choices except sources."""
        split, pool = self.split, self.config.adversary.pool
        slots = None
        if pool is not None:
            uniform = self.random.uniform("slots", step, split.attacked, (self.pos,))
            slots = (uniform * pool).long().clamp_(max=pool - 1)
        return StepSamples(
            stochastic_routing=self._routing("routing", step, split.stochastic, self.config.stochastic_routing),
            adversarial_routing=self._routing("attacked", step, split.attacked, self.config.adversary.routing),
            slots=slots,
        )

    def sources(self, what: str, step: int, rows: Sequence[int]) -> Float[Tensor, "rows pos C_and_deltas"]:
        """A step's ``stochastic`` or ``layerwise`` sources of rows."""
        return self.random.uniform(what, step, rows, (self.pos, self.width)).to(self.dtype)

    def _routing(self, what: str, step: int, rows: Sequence[int], kind: str) -> Routing | None:
        if kind == "all":
            return None
        names = self.site_axis.names
        draw = lambda generator: uniform_k(len(names), (self.pos,), generator=generator)  # noqa: E731
        return Routing(names, self.random.rows(what, step, rows, draw))


def routed_share(routing: Routing | None) -> float:
    """The share of tokens at which a site is expected to be masked."""
    return 1.0 if routing is None else uniform_k_share(len(routing))
