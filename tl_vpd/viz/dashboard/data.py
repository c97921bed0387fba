"""What a dashboard can show beside a harvest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from tl_vpd.analysis import Clustering, DatasetGraph
from tl_vpd.checks import instance
from tl_vpd.decomposition import Decomposition
from tl_vpd.printing import Printed


@dataclass(frozen=True)
class DashboardData(Printed):
    """Results of other analyses of the same decomposition; each may be left out.

    Attributes:
        clustering: its components get pages.
        labels: texts by address (of components: ``component:7``), ``Labels``, or a table with the columns ``subcomponent`` and
            ``label``, whose columns of numbers (scores) are shown too.
        graph: of many prompts; each page lists the strongest edges among harvested subcomponents.
        ablations: what ``ablation_table`` gives: the change of its metric where one subcomponent is ablated; of the
            harvested ones.
        prompts: strings, or rows of tokens, whose importances can be looked at token by token.

    Raises:
        TypeError: a value is of another type.
        ValueError: the table of ablations lacks a column.
    """

    clustering: Clustering | None = None
    labels: Mapping[str, Any] | pd.DataFrame | None = None
    graph: DatasetGraph | None = None
    ablations: pd.DataFrame | None = None
    prompts: Any = None

    def __post_init__(self) -> None:
        types = (("clustering", Clustering), ("graph", DatasetGraph), ("ablations", pd.DataFrame))
        for name, kind in types:
            if getattr(self, name) is not None:
                instance(name, getattr(self, name), kind)
        if self.ablations is not None and not {"subcomponent", "change"} <= set(self.ablations):
            raise ValueError(
                f"ablations has the columns {', '.join(map(str, self.ablations))}: 'subcomponent' and 'change' are needed, as "
                "ablation_table gives them."
            )

    def check(self, decomposition: Decomposition) -> None:
        """Raises ValueError, KeyError or IndexError unless clustering and graph are of this decomposition."""
        if self.clustering is not None:
            self.clustering.check(decomposition)
        for node in () if self.graph is None else self.graph.nodes:
            decomposition.subcomponent(node)
