"""Does a circuit hold when everything it leaves out is ablated, and when an adversary chooses how?

A circuit claims that its nodes do the work and that all else may be ablated. Plain ablation checks one setting of all else (every
piece at 0, at its mean, at another prompt's value); but pieces left out may cancel each other in that setting and not in another.
So the audit also draws settings at random, and lets an adversary look for the worst:

    min over r ∈ [0, 1]^pieces of metric(circuit kept, piece i at  ablated_i + r_i (own_i − ablated_i))

by sign-gradient steps, the same r for every prompt and position (it has to find what is systematically wrong). A circuit that
keeps its metric there supports: *sufficient for this behaviour on these prompts, under maskings up to this budget*; nothing more.

    >>> found = audit_circuit(model, tokens, ["blocks.0.attn.hook_z:3", "blocks.1.attn.hook_z:1"], metric)      # doctest: +SKIP
    >>> found.to_pandas()                                                                                       # doctest: +SKIP

``places`` says what "everything else" is; no decomposition is needed for heads, MLPs, neurons and residual positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_vpd.analysis.audit.ablate import Reference
from tl_vpd.analysis.audit.auditor import Metric, auditor, random_circuit
from tl_vpd.analysis.audit.node_set import NodeSet
from tl_vpd.analysis.nodes import Node
from tl_vpd.site import Subcomponent, nearest

if TYPE_CHECKING:
    from tl_vpd.decomposition import Decomposition

ABLATIONS = ("zero", "mean", "resample", "stochastic", "adversarial")
REFERENCES: tuple[Reference, ...] = ("zero", "mean", "resample")


@dataclass(frozen=True)
class CircuitAudit:
    """What a circuit's metric is under every ablation of everything else.

    ``rows`` has one row an ablation (and budget): ``ablation``, ``reference`` (what a piece at r = 0 is), ``steps``; ``circuit``;
    ``recovered = (circuit − nothing) / (whole − nothing)``; and what it is to be compared with: ``nothing`` (every piece ablated
    to the reference), ``complement`` (the circuit ablated to it, all else kept), ``random_mean`` and ``random_best`` (circuits of
    as many pieces of the same kinds, under the same ablation; with several budgets, the first). ``worst`` holds the
    worst sources found, by number of steps, on the concatenated axis of ``node_set``.
    """

    nodes: tuple[Node, ...]
    node_set: NodeSet
    whole: float
    rows: pd.DataFrame
    worst: dict[int, Float[Tensor, "pos total"]]
    lower_is_better: bool

    def to_pandas(self) -> pd.DataFrame:
        """``rows``, with the whole model's metric as its first row."""
        first = pd.DataFrame([{"ablation": "none", "reference": "", "circuit": self.whole, "recovered": 1.0}])
        return pd.concat([first, self.rows], ignore_index=True)[list(self.rows.columns)]

    def value(self, ablation: str, *, steps: int | None = None) -> float:
        """The circuit's metric under an ablation (``steps`` None: the largest budget).

        Raises:
            KeyError: this ablation or budget was not run.
        """
        own = self.rows[self.rows["ablation"] == ablation]
        own = own if steps is None else own[own["steps"] == steps]
        if not len(own):
            raise KeyError(
                f"{ablation!r} with steps={steps} was not run{nearest(ablation, set(self.rows['ablation']))}."
            )
        return float(own["circuit"].iloc[-1])

    def top(self, k: int = 10, *, steps: int | None = None) -> pd.DataFrame:
        """The ``k`` pieces that the adversary keeps most of: piece, kept (its source, the mean over positions where they differ).

        Raises:
            KeyError: no adversary was run.
        """
        if not self.worst:
            raise KeyError("No adversary was run: audit with ablations that include 'adversarial'.")
        sources = self.worst[max(self.worst) if steps is None else steps].mean(0)
        best = sources.topk(min(k, len(sources))).indices.tolist()
        labels = self.node_set.labels()
        return pd.DataFrame({"piece": [labels[i] for i in best], "kept": sources[best].tolist()})


def audit_circuit(
    model: nn.Module,
    tokens: Any,
    nodes: Sequence[str | Node | Subcomponent],
    metric: Metric,
    decomposition: Decomposition | None = None,
    *,
    ablations: Sequence[str] = ABLATIONS,
    lower_is_better: bool = False,
    reference: Reference | str = "zero",
    reference_tokens: Any = None,
    budgets: Sequence[int] = (20,),
    step_size: float | None = None,
    restarts: int = 2,
    per_position: bool = False,
    draws: int = 8,
    controls: int = 5,
    among: str | Sequence[str] | None = None,
    attention_mask: Tensor | None = None,
    seed: int = 0,
) -> CircuitAudit:
    """Audits a circuit.

    Args:
        tokens: prompts, as strings or tokens ``[batch, pos]``. nodes: the circuit, as ``places`` lists them.
        metric: of the logits; what the circuit is to keep high (or low, with ``lower_is_better``).
        decomposition: whose subcomponents the nodes are (None: heads, MLPs, neurons or residual positions).
        ablations: of ``zero mean resample stochastic adversarial``.
        reference: what a piece at source 0 is for the last two.
        reference_tokens: prompts that means and other values are taken from (None: the prompts themselves).
        budgets: the adversary's numbers of steps, each of ``step_size`` (None: ``2 / steps``).
        restarts: starts of every attack: plain ablation first, the others random. The worst setting met on the way counts.
        per_position: sources of their own for each position (a far stronger adversary).
        draws: random settings that the stochastic figure is the mean of. controls: random circuits of the same kinds (0: none).
        among: patterns of names to audit; all else stays as it is (None: everything).

    Raises:
        KeyError, IndexError, ValueError: a node, pattern, prompt or argument does not exist or fit; the metric gives no single
            number, or none that can be differentiated.
        RuntimeError: a hook does not run in this model.
    """
    _check_arguments(ablations, reference, budgets, restarts, draws)
    default = cast(Reference, reference)
    wanted = [*(a for a in REFERENCES if a in ablations), default]
    with auditor(
        model,
        tokens,
        nodes,
        metric,
        decomposition,
        references=wanted,
        reference_tokens=reference_tokens,
        among=among,
        attention_mask=attention_mask,
        lower_is_better=lower_is_better,
        per_position=per_position,
        step_size=step_size,
        restarts=restarts,
        draws=draws,
        seed=seed,
    ) as audit:
        kept, whole, sign = audit.kept, audit.whole, audit.sign
        random = [random_circuit(audit.node_set, kept, audit.generator) for _ in range(controls)]
        rows, worst = [], {}
        compared: dict[Reference, tuple[float, float]] = {}
        for ablation in ablations:
            against = cast(Reference, ablation) if ablation in REFERENCES else default
            if against not in compared:
                compared[against] = audit.plain(torch.zeros_like(kept), against), audit.plain(~kept, against)
            nothing, complement = compared[against]
            for steps in budgets if ablation == "adversarial" else (None,):
                found, sources = audit.under(ablation, kept, against, steps)
                if sources is not None and steps is not None:
                    worst[steps] = sources
                alongside = random if steps in (None, budgets[0]) else []
                alike = [audit.under(ablation, own, against, steps)[0] for own in alongside]
                rows.append(
                    {
                        "ablation": ablation,
                        "reference": against,
                        "steps": steps,
                        "circuit": found,
                        "recovered": recovered(found, nothing, whole),
                        "nothing": nothing,
                        "complement": complement,
                        "random_mean": sum(alike) / len(alike) if alike else float("nan"),
                        "random_best": sign * max(sign * a for a in alike) if alike else float("nan"),
                    }
                )
        table = pd.DataFrame(rows)
        table["steps"] = table["steps"].astype("Int64")
        return CircuitAudit(audit.circuit, audit.node_set, whole, table, worst, lower_is_better)


def recovered(circuit: float, nothing: float, whole: float) -> float:
    """``(circuit − nothing) / (whole − nothing)``; NaN where ablating everything changes nothing."""
    return (circuit - nothing) / (whole - nothing) if whole != nothing else float("nan")


def _check_arguments(
    ablations: Sequence[str], reference: str, budgets: Sequence[int], restarts: int, draws: int
) -> None:
    for name in ablations:
        if name not in ABLATIONS:
            raise ValueError(f"{name!r} is no ablation{nearest(name, ABLATIONS)}: choose of {', '.join(ABLATIONS)}.")
    if reference not in REFERENCES:
        raise ValueError(f"reference={reference!r}{nearest(reference, REFERENCES)}: choose zero, mean or resample.")
    if restarts < 1 or draws < 1 or any(steps < 1 for steps in budgets) or not budgets:
        raise ValueError(f"budgets={list(budgets)}, restarts={restarts}, draws={draws}: each must be at least 1.")
