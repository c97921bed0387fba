"""Influence and strongest paths in a graph whose edges lead from lower to higher numbers.

Each edge into a node counts as a fraction of their summed sizes, ``s = |w| / Σ |w|``. A node's influence is what flows back to it
along these fractions from the logits; a path's strength is the product of its fractions.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Path:
    """A chain of nodes, from its start to the node it explains.

    Attributes:
        numbers: the nodes' numbers.
        weights: its edges' signed weights.
        strength: the product of its edges' fractions.
        nodes: the nodes' labels.
    """

    numbers: tuple[int, ...]
    weights: tuple[float, ...]
    strength: float
    nodes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.strength:.3f}  " + " → ".join(self.nodes or map(str, self.numbers))


def fractions(target: Int[Tensor, " edges"], weight: Float[Tensor, " edges"], nodes: int) -> Float[Tensor, " edges"]:
    """Each edge's size as a fraction of all that enters its target; 0 where that is 0."""
    size = weight.abs().double()  # single precision could not hold every sum
    total = size.new_zeros(nodes).index_add_(0, target.long(), size)[target.long()]
    return (size / torch.where(total == 0, 1, total)).to(torch.promote_types(weight.dtype, torch.float32))


def influence(
    source: Int[Tensor, " edges"],
    target: Int[Tensor, " edges"],
    weight: Float[Tensor, " edges"],
    start: Float[Tensor, " nodes"],
) -> Float[Tensor, " nodes"]:
    """``Σ_k start · S^k`` over k ≥ 0, S the matrix of fractions."""
    fraction, source, target = fractions(target, weight, len(start)), source.long(), target.long()
    total = flow = start
    # Edges only lead back, so that nothing is left after as many rounds as there are layers.
    while bool((flow != 0).any()):
        flow = torch.zeros_like(flow).index_add_(0, source, fraction * flow[target])
        total = total + flow
    return total


def strongest_paths(
    source: Int[Tensor, " edges"], target: Int[Tensor, " edges"], weight: Float[Tensor, " edges"], end: int, k: int
) -> list[Path]:
    """The k strongest paths to the node ``end`` from nodes that nothing enters, strongest first.

    Best-first search backwards; what is still to come is bounded by the strongest way on from a node, which is known exactly, so
    that only what belongs to one of the k is looked at.
    """
    incoming = _incoming(source, target, weight, end)
    best: dict[int, float] = {}
    for node in sorted(incoming):  # sources have lower numbers and are known already
        best[node] = max((fraction * best[s] for s, fraction, _ in incoming[node]), default=1.0)
    queue: list[tuple[float, tuple[int, ...], tuple[float, ...], float]] = [(-best[end], (end,), (), 1.0)]
    paths: list[Path] = []
    while queue and len(paths) < k:
        _, numbers, weights, strength = heapq.heappop(queue)
        before = incoming[numbers[0]]
        if not before:
            paths.append(Path(numbers, weights, strength))
            continue
        # No more than k of the edges can be among the k strongest paths.
        for s, fraction, w in sorted(before, key=lambda edge: -edge[1] * best[edge[0]])[:k]:
            longer = strength * fraction
            heapq.heappush(queue, (-longer * best[s], (s, *numbers), (w, *weights), longer))
    return paths


def _incoming(source: Tensor, target: Tensor, weight: Tensor, end: int) -> dict[int, list[tuple[int, float, float]]]:
    """By node from which ``end`` can be reached: (source, fraction, weight) of the edges that enter it."""
    order = target.argsort(stable=True)
    sources, weights = source[order].tolist(), weight[order].tolist()
    sizes = weight[order].abs().tolist()
    counts = torch.bincount(target.long(), minlength=end + 1).tolist()
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    incoming: dict[int, list[tuple[int, float, float]]] = {}
    waiting = [end]
    while waiting:
        node = waiting.pop()
        if node in incoming:
            continue
        edges = range(starts[node], starts[node + 1]) if node < len(counts) else range(0)
        total = sum(sizes[i] for i in edges)
        incoming[node] = [(sources[i], sizes[i] / total, weights[i]) for i in edges if sizes[i]]
        waiting.extend(s for s, _, _ in incoming[node] if s not in incoming)
    return incoming
