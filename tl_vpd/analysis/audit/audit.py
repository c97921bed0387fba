"""Does a circuit hold when everything it leaves out is ablated, and when an adversary chooses how?

A circuit claims that its nodes do the work and that everything else may be ablated. Plain ablation checks one setting of the rest
(every node at 0, at its mean, at another prompt's value); but the nodes left out may cancel each other in that setting and not
in another. So the audit also tries random settings, and lets an adversary look for the worst:

    min over r ∈ [0, 1]^nodes of metric(circuit whole, every other node i at  ablated_i + r_i (value_i − ablated_i))

by sign-gradient steps, the same r for every prompt and position (the adversary has to find what is systematically wrong). A
circuit that keeps its metric there supports: *sufficient for this behaviour on these prompts, under maskings up to this budget*;
nothing more.

    >>> heads = ["blocks.0.attn.hook_z:3", "blocks.1.attn.hook_z:1"]
    >>> audit_circuit(None, model, tokens, heads, metric).to_pandas()               # doctest: +SKIP

``node_set`` says what "everything else" is; heads, MLPs, neurons and residual positions need no decomposition. A circuit may
also be a list of edges between heads and MLPs, as EAP, EAP-IG and ACDC give: then everything else is every other edge, and
``edge_ablation`` says what replaces it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tl_vpd.analysis.audit.auditor import Auditor, auditor, random_circuit
from tl_vpd.analysis.audit.config import ABLATIONS, REFERENCES, AuditConfig, Reference
from tl_vpd.analysis.audit.edge_set import EdgeSet
from tl_vpd.analysis.audit.node_set import NodeSet
from tl_vpd.analysis.edges import Edge
from tl_vpd.analysis.metric import Metric
from tl_vpd.analysis.nodes import Node
from tl_vpd.baselines.transcoders import Transcoders
from tl_vpd.checks import choice, config_of, integer
from tl_vpd.decomposition import Decomposition
from tl_vpd.printing import Printed
from tl_vpd.site import Subcomponent, nearest


@dataclass(frozen=True)
class CircuitAudit(Printed):
    """A circuit's metric under every ablation of everything else.

    Attributes:
        nodes: the circuit: nodes, or edges.
        node_set: the circuit and everything else.
        whole: the metric of the model itself.
        rows: one row per ablation (and budget): ``ablation``, ``reference`` (the value of a node at r = 0), ``steps``;
            ``circuit`` (the metric); ``recovered = (circuit − nothing) / (whole − nothing)``; and what it is to be compared
            with: ``nothing`` (every node ablated to the reference), ``complement`` (the circuit ablated to it, the rest whole),
            ``random_mean`` and ``random_best`` (circuits of as many nodes of the same kinds, under the same ablation; with
            several budgets, the first).
        worst: the worst sources by number of steps, on the axis of ``node_set``.
        lower_is_better: whether the circuit is to keep the metric low.
    """

    nodes: tuple[Node, ...] | tuple[Edge, ...]
    node_set: NodeSet | EdgeSet
    whole: float
    rows: pd.DataFrame
    worst: dict[int, Float[Tensor, "_ total"]]
    lower_is_better: bool

    def to_pandas(self) -> pd.DataFrame:
        """``rows``, with the whole model's metric as its first row."""
        first = pd.DataFrame([{"ablation": "none", "reference": "", "circuit": self.whole, "recovered": 1.0}])
        return pd.concat([first, self.rows], ignore_index=True)[list(self.rows.columns)]

    def value(self, ablation: str, *, steps: int | None = None) -> float:
        """The circuit's metric under an ablation (``steps`` None: the largest budget).

        Raises:
            ValueError: there is no such ablation.
            KeyError: this ablation or budget was not run.
        """
        choice("ablation", ablation, ABLATIONS)
        steps = None if steps is None else integer("steps", steps)
        rows = self.rows[self.rows["ablation"] == ablation]
        rows = rows if steps is None else rows[rows["steps"] == steps]
        if not len(rows):
            raise KeyError(
                f"{ablation!r} with steps={steps} was not run{nearest(ablation, set(self.rows['ablation']))}."
            )
        return float(rows["circuit"].iloc[-1])

    def top(self, k: int = 10, *, steps: int | None = None) -> pd.DataFrame:
        """The ``k`` nodes of the adversary's largest sources: node, source (the mean over positions where they differ).

        Raises:
            KeyError: no adversary was run, or none with so many steps.
        """
        k = integer("k", k, minimum=0)
        if not self.worst:
            raise KeyError("No adversary was run: audit with ablations that include 'adversarial'.")
        budget = max(self.worst) if steps is None else integer("steps", steps)
        if budget not in self.worst:
            raise KeyError(f"steps={budget} was not run: the budgets are {', '.join(map(str, self.worst))}.")
        sources = self.worst[budget].mean(0)
        best = sources.topk(min(k, len(sources))).indices.tolist()
        labels = self.node_set.labels()
        return pd.DataFrame({"node": [labels[i] for i in best], "source": sources[best].tolist()})


def audit_circuit(
    decomposition: Decomposition | Transcoders | None,
    model: nn.Module,
    prompts: Any,
    nodes: Sequence[str | Node | Subcomponent | Edge],
    metric: Metric,
    *,
    config: AuditConfig | None = None,
    reference_prompts: Any = None,
    attention_mask: Tensor | None = None,
) -> CircuitAudit:
    """Audits a circuit.

    Args:
        decomposition: whose subcomponents the nodes are; or transcoders, whose latents they are (None: they are heads, MLPs,
            neurons, residual positions or edges).
        model: the target.
        prompts: a string, strings, or tokens ``[batch, pos]``.
        nodes: the circuit, as ``node_set`` lists them; or edges (``a0.h1->a1.h3<q>``, see ``analysis.edges``).
        metric: takes the logits ``[batch, pos, vocab]``, gives one number, differentiable where an adversary is to use it.
        config: which ablations, and the adversary (None: the defaults).
        reference_prompts: prompts that means and other values are taken from (None: the prompts themselves); for
            ``corrupted`` one per prompt.
        attention_mask: 0 at padding of the prompts (None: where TransformerLens sees padding).

    Raises:
        KeyError: a node or pattern does not exist.
        IndexError: a node's index or position does not exist.
        ValueError: the nodes mix kinds, prompts do not fit, the model has other weights or no hooks for edges, or the metric
            gives no single number or none that can be differentiated.
        RuntimeError: a hook does not run in this model.
        TypeError: an argument is of another type, or the metric gives no number.
        FloatingPointError: the metric is NaN or infinite.

    Warns (RuntimeWarning) where ablating every node leaves the metric as it is, so that ``recovered`` is not defined (NaN).
    """
    config = config_of(AuditConfig, config)
    with auditor(decomposition, model, prompts, nodes, metric, config, reference_prompts, attention_mask) as audit:
        in_circuit = audit.in_circuit
        controls = [random_circuit(audit.node_set, in_circuit, audit.generator) for _ in range(config.controls)]
        limits: dict[Reference, tuple[float, float]] = {}
        rows, worst = [], {}
        for ablation in config.ablations:
            reference = config.reference_of(ablation)
            if reference not in limits:
                nothing = audit.plain(torch.zeros_like(in_circuit), reference)
                limits[reference] = nothing, audit.plain(~in_circuit, reference)
                if nothing == audit.whole:
                    warnings.warn(
                        f"The metric is {nothing:.6g} for the whole model and with every node at the reference {reference!r} "
                        "too: what is recovered is not defined (NaN), so choose a metric that the nodes change.",
                        RuntimeWarning,
                        stacklevel=2,
                    )
            for steps in config.budgets if ablation == "adversarial" else (None,):
                value, sources = _under(audit, config, ablation, in_circuit, steps)
                if sources is not None and steps is not None:
                    worst[steps] = sources
                compared = controls if steps in (None, config.budgets[0]) else []
                random = [_under(audit, config, ablation, control, steps)[0] for control in compared]
                rows.append(_row(ablation, reference, steps, value, limits[reference], random, audit))
        table = pd.DataFrame(rows)
        table["steps"] = table["steps"].astype("Int64")
        return CircuitAudit(audit.circuit, audit.node_set, audit.whole, table, worst, config.lower_is_better)


def _under(
    audit: Auditor, config: AuditConfig, ablation: str, in_circuit: Bool[Tensor, "pos total"], steps: int | None
) -> tuple[float, Tensor | None]:
    """The metric under one of the five ablations, and the adversary's sources."""
    reference = config.reference_of(ablation)
    if ablation in REFERENCES:
        return audit.plain(in_circuit, reference), None
    if ablation == "stochastic":
        return audit.stochastic(in_circuit, reference, config.draws), None
    assert steps is not None
    return audit.attack(in_circuit, reference, steps)


def _row(
    ablation: str,
    reference: Reference,
    steps: int | None,
    value: float,
    limits: tuple[float, float],
    random: Sequence[float],
    audit: Auditor,
) -> dict[str, Any]:
    """One row of the table; ``limits`` are the metrics of nothing and of the complement."""
    sign, (nothing, complement) = audit.config.sign, limits
    return {
        "ablation": ablation,
        "reference": reference,
        "steps": steps,
        "circuit": value,
        "recovered": recovered(value, nothing, audit.whole),
        "nothing": nothing,
        "complement": complement,
        "random_mean": sum(random) / len(random) if random else float("nan"),
        "random_best": sign * max(sign * value for value in random) if random else float("nan"),
    }


def recovered(circuit: float, nothing: float, whole: float) -> float:
    """``(circuit − nothing) / (whole − nothing)``; NaN where ablating everything changes nothing."""
    return (circuit - nothing) / (whole - nothing) if whole != nothing else float("nan")
