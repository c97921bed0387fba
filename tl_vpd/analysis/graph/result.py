"""An attribution graph: its nodes and edges, and the questions it answers.

Nodes are numbered from 0 in the order embeddings, subcomponents by site and position, logits; every edge leads from a lower
number to a higher one. A node's label is ``embed@3``, ``blocks.1.attn.W_Q:316@5`` or ``logits:7@9``.

    >>> graph.top_edges(5)                                    # doctest: +SKIP
    >>> graph.paths("logits:7@9", k=3)                        # doctest: +SKIP
    >>> graph.pruned(nodes=50).save("closing_bracket")        # doctest: +SKIP
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_vpd.analysis.graph.checks import check_graph
from tl_vpd.analysis.graph.paths import Path as NodePath
from tl_vpd.analysis.graph.paths import influence, strongest_paths
from tl_vpd.analysis.graph.targets import LogitTarget
from tl_vpd.analysis.nodes import Node
from tl_vpd.checks import device_of, integer, item, number, path_of, sequence, shown
from tl_vpd.site import nearest

if TYPE_CHECKING:
    import networkx

EMBEDDINGS, LOGITS = "embed", "logits"


@dataclass(frozen=True)
class AttributionGraph:
    """A prompt's graph.

    Attributes:
        tokens: the prompt.
        words: the text of every token.
        names: ``embed``, the sites in the order of the forward pass, ``logits``.
        logits: what the logit nodes stand for.
        kind: each node's index in ``names``.
        index: each node's subcomponent (an embedding's and a logit's: the token).
        pos: each node's position.
        activation: inner activation a (a logit's: its value; an embedding's: 1).
        importance: g (of embeddings and logits: 1).
        source: the node that each edge starts from.
        target: the node that each edge enters.
        weight: of each edge.
        settings: how the graph was made.
        deltas: where norms and Δs were fixed, what Δs add to each node's value beside its edges; else None.
        biases: likewise, what biases add.

    Raises:
        TypeError: a field is of another type.
        ValueError: fields contradict each other or are out of range (``graph.checks`` lists what a graph fulfils).
    """

    tokens: Int[Tensor, " pos"]
    words: tuple[str, ...]
    names: tuple[str, ...]
    logits: tuple[LogitTarget, ...]
    kind: Int[Tensor, " nodes"]
    index: Int[Tensor, " nodes"]
    pos: Int[Tensor, " nodes"]
    activation: Float[Tensor, " nodes"]
    importance: Float[Tensor, " nodes"]
    source: Int[Tensor, " edges"]
    target: Int[Tensor, " edges"]
    weight: Float[Tensor, " edges"]
    settings: dict[str, Any] = field(default_factory=dict)
    deltas: Float[Tensor, " nodes"] | None = None
    biases: Float[Tensor, " nodes"] | None = None

    def __post_init__(self) -> None:
        check_graph(self)

    def __len__(self) -> int:
        return len(self.kind)

    def __repr__(self) -> str:
        return (
            f"AttributionGraph({len(self)} nodes, {len(self.weight)} edges, {len(self.words)} tokens; "
            f"{', '.join(t.text for t in self.logits)})"
        )

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Every node's label."""
        labels, logits = [], iter(self.logits)
        for kind, index, pos in zip(self.kind.tolist(), self.index.tolist(), self.pos.tolist(), strict=True):
            name = self.names[kind]
            if name == LOGITS:
                labels.append(next(logits).label)
            else:
                labels.append(f"{name}@{pos}" if name == EMBEDDINGS else f"{name}:{index}@{pos}")
        return tuple(labels)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {label: number for number, label in enumerate(self.labels)}

    def number(self, node: str | Node | int) -> int:
        """The number of a node, from its label, address or number. Raises KeyError with the nearest label, IndexError beyond the
        last node, TypeError for anything else.
        """
        node = item(node)
        if isinstance(node, int) and not isinstance(node, bool):
            if not 0 <= node < len(self):
                raise IndexError(f"Node {shown(node)} does not exist: the graph has nodes 0 to {len(self) - 1}.")
            return node
        if not isinstance(node, str | Node):
            raise TypeError(
                f"{shown(node)} is a {type(node).__name__}: give a node's label, such as {self.labels[-1]!r}."
            )
        label = str(node)
        if label not in self._numbers:
            raise KeyError(f"{shown(label)} is not a node of this graph{nearest(label, self.labels)}.")
        return self._numbers[label]

    @cached_property
    def is_subcomponent(self) -> Bool[Tensor, " nodes"]:
        """Whether a node is a subcomponent."""
        return (self.kind > 0) & (self.kind < len(self.names) - 1)

    def subcomponents(self) -> list[Node]:
        """The nodes that are subcomponents, for ablations, pruning and audits."""
        where = self.is_subcomponent.nonzero().flatten().tolist()
        return [Node(self.names[self.kind[i]], int(self.index[i]), int(self.pos[i])) for i in where]

    @cached_property
    def influence(self) -> Float[Tensor, " nodes"]:
        """The fraction of all that reaches the logits that passes through a node, by size of edges (each target's sum to 1)."""
        return influence(self.source, self.target, self.weight, self.start())

    def start(self) -> Float[Tensor, " nodes"]:
        """The logits' weights: their probabilities, scaled to sum to 1 (a difference counts as its first token)."""
        weights = torch.zeros_like(self.activation, dtype=torch.promote_types(self.activation.dtype, torch.float32))
        p = torch.tensor([max(t.probability, 1e-9) for t in self.logits]).to(weights)
        weights[self.kind == len(self.names) - 1] = p / p.sum()
        return weights

    def nodes(self) -> pd.DataFrame:
        """One row per node: ``node, name, index, pos, token, activation, importance, influence``."""
        words = [self.words[p] for p in self.pos.tolist()]
        texts = iter(self.logits)
        last = len(self.names) - 1
        words = [next(texts).text if k == last else w for k, w in zip(self.kind.tolist(), words, strict=True)]
        return pd.DataFrame(
            {
                "node": self.labels,
                "name": [self.names[k] for k in self.kind.tolist()],
                "index": self.index.tolist(),
                "pos": self.pos.tolist(),
                "token": words,
                "activation": self.activation.tolist(),
                "importance": self.importance.tolist(),
                "influence": self.influence.tolist(),
            }
        )

    def _edges(self, which: Tensor) -> pd.DataFrame:
        source, target = self.source[which].tolist(), self.target[which].tolist()
        return pd.DataFrame(
            {
                "source": [self.labels[i] for i in source],
                "target": [self.labels[i] for i in target],
                "weight": self.weight[which].tolist(),
            }
        )

    def to_pandas(self) -> pd.DataFrame:
        """All edges: ``source, target, weight``, by target and source."""
        return self._edges(torch.arange(len(self.weight), device=self.weight.device))

    def top_edges(
        self, k: int = 20, *, source: str | Node | int | None = None, target: str | Node | int | None = None
    ) -> pd.DataFrame:
        """The k edges of largest size, of all or of those from or into a node."""
        k = integer("k", k, minimum=0)
        chosen = torch.ones_like(self.source, dtype=torch.bool)
        if source is not None:
            chosen &= self.source == self.number(source)
        if target is not None:
            chosen &= self.target == self.number(target)
        which = chosen.nonzero().flatten()
        return self._edges(which[self.weight[which].abs().argsort(descending=True, stable=True)[:k]])

    def paths(self, target: str | Node | int | None = None, k: int = 10) -> list[NodePath]:
        """The k strongest paths that end at a node (None: the likeliest logit) and start where nothing leads further back.

        A path's strength is the product over its edges of ``|weight|`` as a fraction of all that enters the edge's target.
        """
        k = integer("k", k, minimum=0)
        end = int(self.start().argmax()) if target is None else self.number(target)
        paths = strongest_paths(self.source, self.target, self.weight, end, k)
        return [replace(path, nodes=tuple(self.labels[i] for i in path.numbers)) for path in paths]

    def sums(self) -> pd.DataFrame:
        """Where norms and Δs were fixed: every node's value next to what its edges, Δs and biases add up to.

        ``rest`` is what no term is linear in: 0 for logits and Q, K, V, gate and in (and O with patterns fixed). Raises
        ValueError unless the graph was made with ``GraphConfig(fixed=("norms", "deltas"), importances=False)``.
        """
        if self.deltas is None or self.biases is None or self.settings.get("importances", True):
            raise ValueError(
                'Edges add up to values only with GraphConfig(fixed=("norms", "deltas"), importances=False): make the graph so.'
            )
        edges = torch.zeros_like(self.activation).index_add(0, self.target.long(), self.weight)
        rest = self.activation - edges - self.deltas - self.biases
        columns = {"value": self.activation, "edges": edges, "deltas": self.deltas, "biases": self.biases, "rest": rest}
        return pd.DataFrame({"node": self.labels, **{n: c.tolist() for n, c in columns.items()}}).iloc[
            len(self.words) :
        ]

    def subgraph(self, nodes: Iterable[str | Node | int]) -> AttributionGraph:
        """These nodes and the edges among them; embeddings and logits stay."""
        chosen = ~self.is_subcomponent
        numbers = [
            self.number(node) for node in ([nodes] if isinstance(nodes, str | Node) else sequence("nodes", nodes))
        ]
        chosen[torch.tensor(numbers, dtype=torch.long, device=chosen.device)] = True
        return self._of(chosen)

    def pruned(self, *, nodes: int | None = None, min_weight: float = 0.0) -> AttributionGraph:
        """The subcomponents of largest influence on the logits (None: all) and their edges of more than a size."""
        min_weight = number("min_weight", min_weight, minimum=0)
        chosen = torch.ones_like(self.is_subcomponent)
        if nodes is not None:
            nodes = integer("nodes", nodes, minimum=0)
            ranked = torch.where(self.is_subcomponent, self.influence, torch.inf).argsort(descending=True, stable=True)
            chosen[ranked[nodes + int((~self.is_subcomponent).sum()) :]] = False
        return self._of(chosen, min_weight)

    def _of(self, chosen: Bool[Tensor, " nodes"], min_weight: float = 0.0) -> AttributionGraph:
        numbers = chosen.cumsum(0) - 1
        source, target = self.source.long(), self.target.long()
        edges = chosen[source] & chosen[target] & (self.weight.abs() > min_weight)
        by_node: dict[str, Any] = {}
        for name in ("kind", "index", "pos", "activation", "importance", "deltas", "biases"):
            values = getattr(self, name)
            by_node[name] = None if values is None else values[chosen]
        chosen_logits = chosen[self.kind == len(self.names) - 1].tolist()
        return replace(
            self,
            **by_node,
            logits=tuple(t for t, is_chosen in zip(self.logits, chosen_logits, strict=True) if is_chosen),
            source=numbers[source[edges]].int(),
            target=numbers[target[edges]].int(),
            weight=self.weight[edges],
        )

    def to_networkx(self) -> networkx.DiGraph:
        """A ``networkx.DiGraph`` on the labels, with the columns of ``nodes()`` and each edge's ``weight``."""
        import networkx

        graph = networkx.DiGraph()
        table = self.nodes().set_index("node")
        graph.add_nodes_from(table.to_dict("index").items())
        labels = self.labels
        graph.add_weighted_edges_from(
            (labels[s], labels[t], w)
            for s, t, w in zip(self.source.tolist(), self.target.tolist(), self.weight.tolist(), strict=True)
        )
        return graph

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes ``graph.safetensors``, which holds everything with checksums, and ``graph.json``, a readable copy of its table.

        A graph that the folder holds is replaced, or stays whole where an OSError says that writing failed.
        """
        from tl_vpd.analysis.graph.files import save

        return save(self, path_of("folder", folder))

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> AttributionGraph:
        """Reads what ``save`` wrote, to a device (tokens stay on the CPU); raises FileNotFoundError where there is no graph,
        ValueError, which says where, for a damaged one.
        """
        from tl_vpd.analysis.graph.files import load

        return load(path_of("folder", folder), device_of(device))
