"""What the masks of one training pass are made from, besides importances: sources, routing, and which sites are masked."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from tl_vpd.masking.routing import Routing


@dataclass(frozen=True)
class MaskInputs:
    """The sources of a pass, and where and for whom they count.

    Attributes:
        sources: in [0, 1], concatenated over sites, Δ's behind.
        source_rows: the row of the sources that each token uses, tokens in the order of the importances' rows (None: the same
            row).
        routing: where the masked path is computed (None: everywhere).
        attacked: the first rows of the batch, whose sources are the adversary's and get a gradient, in a pass with rows of both
            kinds (None: there is one kind).
        sites: the sites that are masked (None: all).
        routed_share: the share of tokens at which a site is expected to be routed.
    """

    sources: Float[Tensor, "rows C_and_deltas"]
    source_rows: Int[Tensor, " tokens"] | None = None
    routing: Routing | None = None
    attacked: int | None = None
    sites: tuple[str, ...] | None = None
    routed_share: float = 1.0
