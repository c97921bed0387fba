"""What must be added to a circuit until an adversary no longer breaks it: a greedy answer, not the smallest one.

In each round the adversary looks for the worst setting of everything else; of the pieces left out, those that would help most
there (to first order, then measured) are tried, and the best is added. A piece that helps at the worst setting found is no proof
that the behaviour runs through it in the model: it says what the circuit's claim depends on.

    >>> fixed = repair_circuit(model, tokens, nodes, metric, target=0.9)                                  # doctest: +SKIP
    >>> fixed.to_pandas()                                                                                 # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tl_vpd.analysis.audit.ablate import Reference
from tl_vpd.analysis.audit.audit import recovered
from tl_vpd.analysis.audit.auditor import Auditor, Metric, auditor, factors
from tl_vpd.analysis.nodes import Node
from tl_vpd.site import Subcomponent

if TYPE_CHECKING:
    from tl_vpd.decomposition import Decomposition


@dataclass(frozen=True)
class Repair:
    """A circuit's course from round to round.

    ``nodes``: the circuit at the end. ``rows``: one a round, ``size`` (pieces; times positions, where nodes have them), ``added``
    (the node added before this round, "" in the first), ``adversarial`` (the metric under the adversary), ``recovered`` of it,
    and ``plain`` (the metric with everything else at the reference). ``holds``: whether the last round reached the target.
    """

    nodes: tuple[Node, ...]
    rows: pd.DataFrame
    holds: bool

    @property
    def added(self) -> tuple[Node, ...]:
        """What was added, in order."""
        return tuple(Node.parse(name) for name in self.rows["added"] if name)

    def to_pandas(self) -> pd.DataFrame:
        """``rows``."""
        return self.rows

    def top(self, k: int = 10) -> pd.DataFrame:
        """The ``k`` additions after which the metric under the adversary rose most: added, gain."""
        gain = self.rows["recovered"].diff().iloc[1:]
        table = pd.DataFrame({"added": self.rows["added"].iloc[1:], "gain": gain})
        return table.nlargest(k, "gain").reset_index(drop=True)


def repair_circuit(
    model: nn.Module,
    tokens: Any,
    nodes: Sequence[str | Node | Subcomponent],
    metric: Metric,
    decomposition: Decomposition | None = None,
    *,
    target: float = 0.9,
    lower_is_better: bool = False,
    reference: Reference = "zero",
    reference_tokens: Any = None,
    steps: int = 20,
    step_size: float | None = None,
    restarts: int = 2,
    per_position: bool = False,
    max_added: int = 20,
    candidates: int = 8,
    among: str | Sequence[str] | None = None,
    attention_mask: Tensor | None = None,
    seed: int = 0,
) -> Repair:
    """Adds nodes to a circuit until the adversary leaves it ``target`` of the metric between nothing and the whole model.

    Args:
        target: the ``recovered`` to reach. candidates: pieces measured in each round. max_added: rounds at most.
        The others are as in ``audit_circuit``.

    Raises:
        KeyError, IndexError, ValueError, RuntimeError: as ``audit_circuit``; the target or a count is out of range.
    """
    if steps < 1 or restarts < 1 or candidates < 1 or max_added < 0 or target > 1:
        raise ValueError(
            f"steps={steps}, restarts={restarts}, candidates={candidates}, max_added={max_added}, target={target}: counts must "
            "be at least 1 (max_added 0) and the target at most 1, the whole model."
        )
    with auditor(
        model,
        tokens,
        nodes,
        metric,
        decomposition,
        references=[reference],
        reference_tokens=reference_tokens,
        among=among,
        attention_mask=attention_mask,
        lower_is_better=lower_is_better,
        per_position=per_position,
        step_size=step_size,
        restarts=restarts,
        draws=1,
        seed=seed,
    ) as audit:
        kept, circuit, added = audit.kept, list(audit.circuit), ""
        nothing = audit.plain(torch.zeros_like(kept), reference)
        rows = []
        while True:
            value, sources = audit.attack(kept, reference, steps)
            share = recovered(value, nothing, audit.whole)
            rows.append((int(kept.sum()), added, value, share, audit.plain(kept, reference)))
            if share >= target or len(rows) > max_added or bool((kept | ~_addable(audit)).all()):
                break
            node, kept = _best(audit, kept, sources, reference, candidates)
            circuit.append(node)
            added = str(node)
        table = pd.DataFrame(rows, columns=["size", "added", "adversarial", "recovered", "plain"])
        return Repair(tuple(circuit), table, share >= target)


def _addable(audit: Auditor) -> Bool[Tensor, " total"]:
    """Every piece but Δ, which is no node."""
    out = torch.ones(audit.node_set.total, dtype=torch.bool, device=audit.kept.device)
    for place, own in zip(audit.node_set.places, audit.node_set.slices(), strict=True):
        if place.kind == "delta":
            out[own] = False
    return out


def _best(
    audit: Auditor,
    kept: Bool[Tensor, "pos total"],
    sources: Float[Tensor, "rows total"],
    against: Reference,
    candidates: int,
) -> tuple[Node, Bool[Tensor, "pos total"]]:
    """The piece that helps most at these sources, of those that promise most to first order; and the circuit with it."""
    gains = first_order_gains(audit, kept, sources, against).masked_fill(kept | ~_addable(audit), -torch.inf)
    best: tuple[float, Node, Tensor] | None = None
    flat = gains.flatten()
    for entry in flat.topk(min(candidates, int((flat > -torch.inf).sum()))).indices.tolist():
        pos, concatenated = divmod(entry, gains.shape[1])
        trial = kept.clone()
        trial[pos, concatenated] = True
        value = audit.sign * audit.at(trial, sources, against)
        if best is None or value > best[0]:
            place, index = audit.node_set.at(concatenated)
            best = value, place.node(index, pos if kept.shape[0] > 1 else None), trial
    assert best is not None, "nothing is left to add"
    return best[1], best[2]


def first_order_gains(
    audit: Auditor, kept: Bool[Tensor, "pos total"], sources: Float[Tensor, "rows total"], against: Reference
) -> Float[Tensor, "pos total"]:
    """``(1 − r) ∂metric/∂m`` of every piece: what keeping it whole would add to the metric (upwards: better)."""
    m = factors(kept, sources)[0].clone().requires_grad_()
    with torch.enable_grad():
        value = audit.metric(audit.ablated.run(m[None], audit.values[against]))
        (gradient,) = torch.autograd.grad(value.squeeze(), m)
    gains = (audit.sign * gradient * (1 - m)).detach()
    return gains if len(gains) == len(kept) else gains.sum(0, keepdim=True)
