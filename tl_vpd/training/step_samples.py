"""The random choices of a step, for this process's rows: where masks act, which sources are taken, and the sources themselves.

>>> draws = Draws(config, shares, pos=64, packing=packing, device=device)      # doctest: +SKIP
>>> now = draws.at(step)                                                     # doctest: +SKIP
>>> draws.sources("stochastic", step, rows, out)                             # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_vpd.masking.routing import uniform_k, uniform_k_share
from tl_vpd.masking.row_random import RowRandom
from tl_vpd.site import ConcatenatedAxis
from tl_vpd.training.config import VPDConfig
from tl_vpd.training.micro_batch import BatchSplit, Routing

START = -1
"""The step of what is drawn before the first one."""


@dataclass(frozen=True)
class StepSamples:
    """What one step has drawn but for sources: routing by kind of row, and which slot of the pool each attacked token takes."""

    stochastic_routing: Routing
    adversarial_routing: Routing
    slots: Int[Tensor, "attacked pos"] | None = None


class StepSampler:
    """What a run draws, step by step.

    Args:
        shares: this process's rows. pos: positions of a row. packing: of all subcomponents.
    """

    def __init__(
        self,
        config: VPDConfig,
        shares: BatchSplit,
        *,
        pos: int,
        site_axis: ConcatenatedAxis,
        device: torch.device | str,
    ) -> None:
        self.config, self.shares, self.pos, self.site_axis = config, shares, pos, site_axis
        self.random = RowRandom(config.seed, torch.device(device))
        self.width = site_axis.total + len(site_axis.names)
        """Sources of a token: one a subcomponent, one a Δ."""

    def start(self) -> Float[Tensor, "attacked slots C_and_deltas"]:
        """Where the adversary's sources start."""
        slots = self.config.adversary.pool or self.pos
        return self.random.uniform("sources", START, self.shares.attacked, (slots, self.width))

    def at(self, step: int) -> StepSamples:
        """All of a step's choices but sources."""
        shares, pool = self.shares, self.config.adversary.pool
        slots = None
        if pool is not None:
            uniform = self.random.uniform("slots", step, shares.attacked, (self.pos,))
            slots = (uniform * pool).long().clamp_(max=pool - 1)
        return StepSamples(
            stochastic_routing=self._routing("routing", step, shares.drawn, self.config.stochastic_routing),
            adversarial_routing=self._routing("attacked", step, shares.attacked, self.config.adversary.routing),
            slots=slots,
        )

    def sources(
        self, what: str, step: int, rows: Sequence[int], out: Float[Tensor, "rows pos C_and_deltas"] | None = None
    ) -> Float[Tensor, "rows pos C_and_deltas"]:
        """A step's ``stochastic`` or ``layerwise`` sources of some rows, into ``out`` where it is given."""
        return self.random.uniform(what, step, rows, (self.pos, self.width), out=out)

    def _routing(self, what: str, step: int, rows: Sequence[int], kind: str) -> Routing:
        if kind == "all":
            return None
        names = self.site_axis.names
        drawn = self.random.rows(what, step, rows, lambda g: uniform_k(len(names), (self.pos,), generator=g))
        return dict(zip(names, drawn.unbind(1), strict=True))


def expected_share(routing: Routing) -> float:
    """The share of tokens at which a site is expected to be routed."""
    return 1.0 if routing is None else uniform_k_share(len(routing))
