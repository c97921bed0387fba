"""All edges of a model: what every head, MLP and the logits read from the embedding and every earlier head and MLP.

The residual stream is a sum, so a reader's input is the sum of its edges (and of the biases ``b_O``, which are not nodes and
stay on). With ``parallel_attn_mlp`` an MLP does not read the heads of its block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool
from torch import Tensor

from tl_vpd.adapters import Adapter, Unsupported
from tl_vpd.adapters.edge_hooks import mlp_reads_heads
from tl_vpd.analysis.audit.node_set import HookSite, matching, mlp_of
from tl_vpd.analysis.edges import READS, Edge
from tl_vpd.site import nearest


@dataclass(frozen=True)
class Reader:
    """A hook on the input of one or more targets.

    Attributes:
        hook: its name.
        targets: what reads there: each head of a block, an MLP, or the logits.
        reads: what heads read for (None: the targets are not heads).
        n_sources: how many sources come before; the first so many.
    """

    hook: str
    targets: tuple[str, ...]
    reads: str | None
    n_sources: int


@dataclass(frozen=True)
class EdgeSet:
    """The edges of a model, on one axis: reader by reader, target by target, source by source.

    Attributes:
        hook_sites: the hooks of the sources' outputs, in the order of the forward pass.
        sources: the sources' names, in the same order.
        readers: the hooks of the targets' inputs.
        among: the entries of the axis that are audited (None: all); the others are never replaced.
    """

    hook_sites: tuple[HookSite, ...]
    sources: tuple[str, ...]
    readers: tuple[Reader, ...]
    among: tuple[int, ...] | None = None

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """The audited edges, in order."""
        every = [
            Edge(source, target, reader.reads)
            for reader in self.readers
            for target in reader.targets
            for source in self.sources[: reader.n_sources]
        ]
        return tuple(every) if self.among is None else tuple(every[i] for i in self.among)

    @property
    def total(self) -> int:
        """How many edges are audited."""
        return len(self.edges)

    @property
    def every(self) -> int:
        """How many edges the model has."""
        return sum(len(reader.targets) * reader.n_sources for reader in self.readers)

    def node(self, concatenated: int, pos: int | None = None) -> Edge:
        """The edge of an entry."""
        edge = self.edges[concatenated]
        return edge if pos is None else Edge(edge.source, edge.target, edge.reads, pos)

    def kinds(self) -> dict[str, list[int]]:
        """Entries by kind of source and reader, such as ``a->q`` or ``m->logits``."""
        kinds: dict[str, list[int]] = {}
        for entry, edge in enumerate(self.edges):
            source = edge.source if edge.source == "input" else edge.source[0]
            target = edge.reads or (edge.target if edge.target == "logits" else edge.target[0])
            kinds.setdefault(f"{source}->{target}", []).append(entry)
        return kinds

    def labels(self) -> list[str]:
        """The label of every edge, in order."""
        return [str(edge) for edge in self.edges]

    def contains(self, nodes: Sequence[Edge], n_pos: int) -> Bool[Tensor, "pos total"]:
        """True for these edges (one row where none has a position).

        Args:
            nodes: edges of the set; one to a head without ``<q|k|v>`` stands for all three.
            n_pos: positions of the prompts.

        Raises:
            KeyError: an edge is not of this set.
            IndexError: its position does not exist.
        """
        entries = {label: entry for entry, label in enumerate(self.labels())}
        result = torch.zeros(n_pos if any(n.pos is not None for n in nodes) else 1, self.total, dtype=torch.bool)
        for node in nodes:
            if node.pos is not None and node.pos >= n_pos:
                raise IndexError(f"{node} does not exist: the prompts have {n_pos} positions.")
            for edge in node.alternatives():
                label = str(Edge(edge.source, edge.target, edge.reads))
                if label not in entries:
                    raise KeyError(
                        f"{edge} is not among the {self.total} edges that are audited{nearest(label, entries)}: an edge goes "
                        "from 'input', a head or an MLP to a later one or to 'logits'."
                    )
                result[slice(None) if node.pos is None else node.pos, entries[label]] = True
        return result


def edge_set_of(adapter: Adapter, among: str | Sequence[str] | None = None) -> EdgeSet:
    """The edges of a model.

    Args:
        adapter: of the model.
        among: patterns of edges (``*->logits``): only these are audited (None: all).

    Raises:
        Unsupported: a block has no heads that can be told apart.
        KeyError: a pattern matches nothing.
    """
    first = "blocks.0.hook_resid_pre"
    hook_sites, sources, readers = [HookSite(first, first, "whole", 1)], ["input"], []
    n_layers = len(adapter.blocks())
    for layer in range(n_layers):
        site = adapter.sites.get(f"blocks.{layer}.attn.W_O")
        if site is None or not site.n_heads:
            raise Unsupported(
                f"Block {layer} has no heads that can be told apart, so it has no edges: audit its nodes."
            )
        heads, before = tuple(f"a{layer}.h{h}" for h in range(site.n_heads)), len(sources)
        readers += [Reader(f"blocks.{layer}.hook_{reads}_input", heads, reads, before) for reads in READS]
        result = f"blocks.{layer}.attn.hook_result"
        hook_sites.append(HookSite(result, result, "head", site.n_heads))
        sources += heads
        for mlp in mlp_of(adapter, layer):
            n_sources = len(sources) if mlp_reads_heads(adapter) else before
            readers.append(Reader(f"blocks.{layer}.hook_mlp_in", (f"m{layer}",), None, n_sources))
            hook_sites.append(mlp)
            sources.append(f"m{layer}")
    readers.append(Reader(f"blocks.{n_layers - 1}.hook_resid_post", ("logits",), None, len(sources)))
    every = EdgeSet(tuple(hook_sites), tuple(sources), tuple(readers))
    if among is None:
        return every
    audited = set(matching(among, every.labels()))
    entries = tuple(entry for entry, label in enumerate(every.labels()) if label in audited)
    return EdgeSet(every.hook_sites, every.sources, every.readers, entries)
