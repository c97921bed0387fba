"""Attributions between subcomponents over many prompts.

    A(c' → c) = Σ_{t, t'} (∂a_c(t) / ∂a_c'(t'))* a_c'(t') g_c'(t')  /  ( Σ_t' g_c'(t') · RMS(a_c) )

Sums run over all real tokens of all prompts, the root mean square too (VPD paper, section on attribution graphs; ``*``: gradients
stopped at every other subcomponent). The *absolute* version has ``|a_c|`` for ``a_c``, so that effects on activations of either
sign do not cancel. Gradients of a sum over tokens cost one backward per target, whatever the number of tokens.

    >>> graph = dataset_graph(vpd, model, tokens[:64])                         # doctest: +SKIP
    >>> graph.top_edges(10, target="blocks.1.attn.W_O:24")                     # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_vpd.analysis.graph.config import DatasetGraphConfig
from tl_vpd.analysis.graph.direct import DirectModel
from tl_vpd.analysis.graph.sums import DatasetSums
from tl_vpd.analysis.harvest.rows import check_are_tokens
from tl_vpd.analysis.nodes import several
from tl_vpd.checks import config_of, instance, integer
from tl_vpd.decomposition import Decomposition
from tl_vpd.printing import Printed
from tl_vpd.site import Subcomponent, nearest

EMBEDDINGS = "embed"


@dataclass(frozen=True)
class DatasetGraph(Printed):
    """Attributions among chosen subcomponents; the first source is the embeddings.

    Attributes:
        nodes: the subcomponents, in concatenated order.
        signed: by target and source; sources are the embeddings and then ``nodes``.
        absolute: the absolute version, likewise (None: it was not made).
        mean_importance: of each node over tokens.
        rms: of each node's inner activation.
        tokens: how many were summed over.
    """

    nodes: tuple[Subcomponent, ...]
    signed: Float[Tensor, "nodes sources"]
    absolute: Float[Tensor, "nodes sources"] | None
    mean_importance: Float[Tensor, " nodes"]
    rms: Float[Tensor, " nodes"]
    tokens: int

    @property
    def labels(self) -> tuple[str, ...]:
        """The sources' labels; targets are those without the first."""
        return (EMBEDDINGS, *map(str, self.nodes))

    def _edges(self, weights: Tensor, k: int | None) -> pd.DataFrame:
        flat = weights.abs().flatten().argsort(descending=True, stable=True)[:k]
        flat = flat[weights.flatten()[flat] != 0]
        target, source = (flat // weights.shape[1]).tolist(), (flat % weights.shape[1]).tolist()
        columns: dict[str, Any] = {
            "source": [self.labels[i] for i in source],
            "target": [str(self.nodes[i]) for i in target],
            "signed": self.signed[target, source].tolist(),
        }
        if self.absolute is not None:
            columns["absolute"] = self.absolute[target, source].tolist()
        return pd.DataFrame(columns)

    def top_edges(
        self,
        k: int = 20,
        *,
        source: str | Subcomponent | None = None,
        target: str | Subcomponent | None = None,
        absolute: bool = False,
    ) -> pd.DataFrame:
        """The k edges of largest size, in the signed or the ``absolute`` version, of all or of those from or into a node:
        ``source, target, signed`` and ``absolute``. Raises KeyError for a node, ValueError for a version that the graph does not
        have.
        """
        k = integer("k", k, minimum=0)
        weights = self.absolute if absolute else self.signed
        if weights is None:
            raise ValueError("This graph has no absolute version: make it with DatasetGraphConfig(absolute=True).")
        weights = weights.clone()
        for node, axis, names in ((target, 0, self.labels[1:]), (source, 1, self.labels)):
            if node is not None:
                label = str(node)
                if label not in names:
                    raise KeyError(f"{label!r} is not a node of this graph{nearest(label, names)}.")
                others = torch.arange(len(names), device=weights.device) != names.index(label)
                weights.index_fill_(axis, others.nonzero().flatten(), 0)
        return self._edges(weights, k)

    def to_pandas(self) -> pd.DataFrame:
        """All edges that are not 0, largest first."""
        return self._edges(self.signed, None)


def dataset_graph(
    decomposition: Decomposition,
    model: nn.Module,
    prompts: Any,
    subcomponents: Sequence[str | Subcomponent] | None = None,
    *,
    config: DatasetGraphConfig | None = None,
    attention_mask: Tensor | None = None,
) -> DatasetGraph:
    """Attributions summed over all tokens of prompts.

    Args:
        decomposition: of the model's weights.
        model: the target.
        prompts: strings, or tokens ``[batch, pos]``.
        subcomponents: the nodes (None: all whose mean importance on these prompts exceeds 1e-6).
        config: versions and memory (None: the defaults).
        attention_mask: 0 at padding (None: where TransformerLens sees padding).

    Raises:
        ValueError: nothing is important on these prompts; attention runs head by head; or the model has other weights.
        KeyError: a site is not decomposed.
        IndexError: there is no such subcomponent.
        TypeError: an argument is of another type.
        FloatingPointError: an attribution is NaN or infinite.
    """
    config = config_of(DatasetGraphConfig, config)
    instance("decomposition", decomposition, Decomposition)
    nodes = None
    if subcomponents is not None:
        nodes = [decomposition.subcomponent(c) for c in several("subcomponents", subcomponents)]
    with DirectModel(decomposition, model) as direct:
        tokens = direct.adapter.tokens(prompts)
        check_are_tokens(tokens, "A graph")
        sums = DatasetSums(direct, tokens, direct.adapter.padding(tokens, attention_mask), config, nodes)
        signed, absolute = sums.attributions()
        dtype = direct.adapter.dtype
        return DatasetGraph(
            nodes=tuple(direct.weights.site_axis.at(i) for i in sums.nodes.tolist()),
            signed=signed.to(dtype),
            absolute=None if absolute is None else absolute.to(dtype),
            mean_importance=(sums.importance[sums.nodes] / sums.n_tokens).to(dtype),
            rms=sums.rms[sums.nodes].to(dtype),
            tokens=sums.n_tokens,
        )
