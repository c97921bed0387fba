"""What every attribution graph fulfils, checked when one is made or loaded.

Nodes are ordered by kind: one embedding per token, subcomponents, one node per logit target; no label is there twice. Edges lead
from an earlier kind to a later one, once for each pair of nodes. All numbers are finite, importances and probabilities in [0, 1].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tl_vpd.checks import check_finite

if TYPE_CHECKING:
    from tl_vpd.analysis.graph.result import AttributionGraph

OF_NODES = {"kind": False, "index": False, "pos": False, "activation": True, "importance": True}
OF_EDGES = {"source": False, "target": False, "weight": True}
OF_TERMS = {"deltas": True, "biases": True}
"""Tensors by what their entries belong to, and whether they are floating-point."""


def check_graph(graph: AttributionGraph) -> None:
    """Raises TypeError where a field is of another type, ValueError where fields contradict each other or are out of range."""
    _check_texts(graph)
    _check_tensors(graph)
    _check_nodes(graph)
    _check_edges(graph)


def _check_texts(graph: AttributionGraph) -> None:
    for name in ("words", "names"):
        texts = getattr(graph, name)
        if not isinstance(texts, tuple) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"{name} of a graph is a tuple of strings.")
    names = graph.names
    if names[:1] != ("embed",) or names[-1:] != ("logits",) or len(set(names)) < len(names):
        raise ValueError("names of a graph are 'embed', every site once, and 'logits'.")
    if not isinstance(graph.settings, dict):
        raise TypeError("settings of a graph are a dictionary.")


def _check_tensors(graph: AttributionGraph) -> None:
    """Types, lengths and finite values."""
    terms = {name: floating for name, floating in OF_TERMS.items() if getattr(graph, name) is not None}
    lengths = {"token": len(graph.words), "node": len(graph.kind), "edge": len(graph.source)}
    groups: dict[str, dict[str, bool]] = {"token": {"tokens": False}, "node": OF_NODES | terms, "edge": OF_EDGES}
    for what, tensors in groups.items():
        for name, floating in tensors.items():
            tensor: Tensor = getattr(graph, name)
            whole = not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool
            if tensor.is_floating_point() != floating or whole == floating:
                raise TypeError(f"{name} of a graph cannot be {tensor.dtype}.")
            if tensor.shape != (lengths[what],):
                raise ValueError(f"{name} has shape {list(tensor.shape)}, and the graph has {lengths[what]} {what}s.")
            if floating:
                check_finite(f"{name} of the graph", tensor)


def _check_nodes(graph: AttributionGraph) -> None:
    n_tokens, last = len(graph.words), len(graph.names) - 1
    kind, index, pos = graph.kind.cpu().long(), graph.index.cpu().long(), graph.pos.cpu().long()
    _in_range("kind", kind, last)
    _in_range("pos", pos, n_tokens - 1)
    _in_range("index", index, None)
    if bool((kind[1:] < kind[:-1]).any()):
        raise ValueError("Nodes of a graph are ordered by kind: embeddings, sites as in names, logits.")
    is_embedding, is_logit = kind == 0, kind == last
    if not torch.equal(index[is_embedding], graph.tokens.cpu().long()) or not torch.equal(
        pos[is_embedding], torch.arange(n_tokens)
    ):
        raise ValueError("A graph has one embedding for every token, in the prompt's order.")
    expected = [(t.token, t.pos) for t in graph.logits]
    if list(zip(index[is_logit].tolist(), pos[is_logit].tolist(), strict=True)) != expected:
        raise ValueError("The logit nodes of a graph are not those of its logit targets.")
    labels = graph.labels
    if len(set(labels)) < len(labels):
        repeated = next(a for a, b in zip(sorted(labels), sorted(labels)[1:], strict=False) if a == b)
        raise ValueError(f"The node {repeated} is there twice in the graph.")
    low, high = (float(bound) for bound in graph.importance.aminmax()) if len(kind) else (0.0, 0.0)
    if low < 0 or high > 1:
        raise ValueError(f"importance of the graph reaches from {low:.3g} to {high:.3g}: importances are in [0, 1].")


def _check_edges(graph: AttributionGraph) -> None:
    n = len(graph)
    source, target = graph.source.long(), graph.target.long()
    _in_range("source", source, n - 1)
    _in_range("target", target, n - 1)
    if bool((graph.kind[source] >= graph.kind[target]).any()):
        raise ValueError("An edge of the graph does not lead from an earlier kind of node to a later one.")
    if len((target * n + source).unique()) < len(source):
        raise ValueError("An edge between the same two nodes is there twice in the graph.")


def _in_range(name: str, values: Tensor, largest: int | None) -> None:
    if not values.numel():
        return
    low, high = (int(bound) for bound in values.aminmax())
    if low < 0 or (largest is not None and high > largest):
        allowed = "at least 0" if largest is None else f"from 0 to {largest}"
        raise ValueError(f"{name} of the graph reaches from {low} to {high}: it must be {allowed}.")


def target_of(fields: Any) -> dict[str, Any]:
    """The fields of a stored logit target; raises ValueError for anything else."""
    needed = {"token", "pos", "minus", "text", "probability"}
    if not isinstance(fields, dict) or set(fields) != needed:
        raise ValueError(f"a logit target has {', '.join(sorted(needed))}")
    return fields
