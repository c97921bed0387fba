"""What must be added to a circuit until an adversary no longer breaks it: a greedy answer, not the smallest one.

In each round the adversary looks for the worst setting of everything else; of the nodes left out, those that would help most
there (to first order, then measured) are tried, and the best is added. A node that helps at the adversary's worst setting does
not prove that the behaviour runs through it in the model: it says what the circuit's claim depends on.

    >>> repair_circuit(None, model, tokens, nodes, metric).to_pandas()                # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tl_vpd.analysis.audit.audit import recovered
from tl_vpd.analysis.audit.auditor import Auditor, auditor, factors
from tl_vpd.analysis.audit.config import RepairConfig
from tl_vpd.analysis.edges import Edge, is_edge
from tl_vpd.analysis.metric import Metric
from tl_vpd.analysis.nodes import Node
from tl_vpd.baselines.transcoders import Transcoders
from tl_vpd.checks import config_of, integer
from tl_vpd.decomposition import Decomposition
from tl_vpd.printing import Printed
from tl_vpd.site import Subcomponent


@dataclass(frozen=True)
class Repair(Printed):
    """A circuit's course from round to round.

    Attributes:
        nodes: the circuit at the end.
        rows: one per round: ``size`` (nodes; times positions, where nodes have them), ``added`` (the node added before this
            round, "" in the first), ``adversarial`` (the metric under the adversary), ``recovered`` of it, and ``plain`` (the
            metric with everything else at the reference).
        holds: whether the last round reached the target.
    """

    nodes: tuple[Node | Edge, ...]
    rows: pd.DataFrame
    holds: bool

    @property
    def added(self) -> tuple[Node | Edge, ...]:
        """The added nodes or edges, in order."""
        return tuple(Edge.parse(name) if is_edge(name) else Node.parse(name) for name in self.rows["added"] if name)

    def to_pandas(self) -> pd.DataFrame:
        """``rows``."""
        return self.rows

    def top(self, k: int = 10) -> pd.DataFrame:
        """The ``k`` additions after which the metric under the adversary rose most: added, gain."""
        k = integer("k", k, minimum=0)
        gain = self.rows["recovered"].diff().iloc[1:]
        table = pd.DataFrame({"added": self.rows["added"].iloc[1:], "gain": gain})
        return table.nlargest(k, "gain").reset_index(drop=True)


def repair_circuit(
    decomposition: Decomposition | Transcoders | None,
    model: nn.Module,
    prompts: Any,
    nodes: Sequence[str | Node | Subcomponent | Edge],
    metric: Metric,
    *,
    config: RepairConfig | None = None,
    reference_prompts: Any = None,
    attention_mask: Tensor | None = None,
) -> Repair:
    """Adds nodes to a circuit until the adversary leaves it ``config.target`` of the way from nothing to the whole model.

    Args:
        decomposition: as in ``audit_circuit``.
        model: the target.
        prompts: as in ``audit_circuit``.
        nodes: the circuit to start from.
        metric: as in ``audit_circuit``; differentiable.
        config: the adversary, and when to stop (None: the defaults).
        reference_prompts: as in ``audit_circuit``.
        attention_mask: as in ``audit_circuit``.

    Raises:
        KeyError: as in ``audit_circuit``.
        IndexError: as in ``audit_circuit``.
        ValueError: as in ``audit_circuit``, or ablating every node leaves the metric as it is.
        RuntimeError: as in ``audit_circuit``.
        TypeError: as in ``audit_circuit``.
        FloatingPointError: as in ``audit_circuit``.
    """
    config = config_of(RepairConfig, config)
    with auditor(decomposition, model, prompts, nodes, metric, config, reference_prompts, attention_mask) as audit:
        in_circuit, added = audit.in_circuit, ""
        circuit: list[Node | Edge] = [*audit.circuit]
        nothing = audit.plain(torch.zeros_like(in_circuit), config.reference)
        if nothing == audit.whole:
            raise ValueError(
                f"The metric is {nothing:.6g} for the whole model and with every node ablated too: there is nothing to repair."
            )
        rows = []
        while True:
            value, sources = audit.attack(in_circuit, config.reference, config.steps)
            fraction = recovered(value, nothing, audit.whole)
            rows.append((int(in_circuit.sum()), added, value, fraction, audit.plain(in_circuit, config.reference)))
            nothing_left = bool((in_circuit | ~_addable(audit)).all())
            if fraction >= config.target or len(rows) > config.max_added or nothing_left:
                break
            node, in_circuit = _best_addition(audit, in_circuit, sources, config)
            circuit.append(node)
            added = str(node)
        table = pd.DataFrame(rows, columns=["size", "added", "adversarial", "recovered", "plain"])
        return Repair(tuple(circuit), table, fraction >= config.target)


def _addable(audit: Auditor) -> Bool[Tensor, " total"]:
    """True for every node; Δ's factor is not a node."""
    result = torch.zeros(audit.node_set.total, dtype=torch.bool, device=audit.in_circuit.device)
    for entries in audit.node_set.kinds().values():
        result[entries] = True
    return result


def _best_addition(
    audit: Auditor, in_circuit: Bool[Tensor, "pos total"], sources: Float[Tensor, "rows total"], config: RepairConfig
) -> tuple[Node | Edge, Bool[Tensor, "pos total"]]:
    """The node that helps most at these sources, of those that promise most to first order; and the circuit with it."""
    gains = first_order_gains(audit, in_circuit, sources, config)
    gains = gains.masked_fill(in_circuit | ~_addable(audit), -torch.inf)
    best: tuple[float, Node | Edge, Tensor] | None = None
    flat = gains.flatten()
    for entry in flat.topk(min(config.candidates, int((flat > -torch.inf).sum()))).indices.tolist():
        pos, concatenated = divmod(entry, gains.shape[1])
        trial = in_circuit.clone()
        trial[pos, concatenated] = True
        value = config.sign * audit.at(trial, sources, config.reference)
        if best is None or value > best[0]:
            best = value, audit.node_set.node(concatenated, pos if len(in_circuit) > 1 else None), trial
    assert best is not None, "nothing is left to add"
    return best[1], best[2]


def first_order_gains(
    audit: Auditor, in_circuit: Bool[Tensor, "pos total"], sources: Float[Tensor, "rows total"], config: RepairConfig
) -> Float[Tensor, "pos total"]:
    """``(1 − r) ∂metric/∂m`` per node: what running it whole would add to the metric (upwards: better)."""
    m = factors(in_circuit, sources)[0].clone().requires_grad_()
    with torch.enable_grad():
        value = audit.metric(audit.ablated_model.run(m[None], audit.values[config.reference]))
        (gradient,) = torch.autograd.grad(value.squeeze(), m)
    gains = (config.sign * gradient * (1 - m)).detach()
    return gains if len(gains) == len(in_circuit) else gains.sum(0, keepdim=True)
