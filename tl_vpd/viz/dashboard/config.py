"""What a dashboard shows."""

from __future__ import annotations

from dataclasses import dataclass

from tl_vpd.checks import check_fields


@dataclass(frozen=True)
class DashboardConfig:
    """How much of a harvest a dashboard shows; all of it is bounded by what was harvested.

    Attributes:
        title: of the first page.
        windows: of the largest importances, per subcomponent.
        samples: windows around random firings, spread over their importances.
        radius: tokens on each side of a window's peak.
        tokens: rows of each token table.
        min_count: how often a subcomponent fires at a token, or with a neighbour, for it to be listed.
        logits: tokens at each end of the logits.
        neighbours: pairs of subcomponent and lag.
        edges: of the dataset graph into each subcomponent or component, and as many out of it.
        heads: of other blocks that read what a subcomponent writes, or write what it reads.
        per_token: subcomponents that are listed at each token of a prompt, those of the largest importance.

    Raises:
        TypeError: a value is of another type.
        ValueError: a value is out of range.
    """

    title: str = "Subcomponents"
    windows: int = 6
    samples: int = 6
    radius: int = 12
    tokens: int = 10
    min_count: int = 2
    logits: int = 8
    neighbours: int = 12
    edges: int = 8
    heads: int = 4
    per_token: int = 200

    def __post_init__(self) -> None:
        sizes = ("windows", "samples", "radius", "tokens", "neighbours", "edges", "heads")
        check_fields(self, **dict.fromkeys(sizes, 0), min_count=1, logits=1, per_token=1)
